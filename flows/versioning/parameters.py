"""Values of params.yaml by dotted name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.versioning.graph import read_stages
from flows.versioning.setting_overrides import read_params


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) pairs of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stage_parameters(
    root: Path, stage: str, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values that dvc.yaml declares as parameters of `stage`, by dotted name.

    Args:
        root: repository root.
        stage: name in dvc.yaml.
        settings: nested; None: those of params.yaml.
    """
    declared = read_stages(root)[stage].get("params", [])
    if settings is None:
        settings = read_params(root)
    values = dict(flatten(settings))
    return {
        name: value
        for name, value in values.items()
        # A stage may declare a whole section; DVC takes every key below it.
        if any(name == key or name.startswith(f"{key}.") for key in declared)
    }
