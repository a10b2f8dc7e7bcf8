"""The sets of a sweep: every combination of typed values. Light, so that refusals are quick."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluation.suites.ablation import Arm, with_overrides
from components.settings.schema import SettingsError
from components.settings.yaml_files import YamlRefused, parse_yaml

_MOST_SETS = 256


class SweepRefused(ValueError):
    """The sweep cannot be started; one line."""


def expand(assignments: Sequence[str], params: Mapping[str, Any]) -> tuple[Arm, ...]:
    """Every combination of `key=value,value` texts.

    Args:
        assignments: dotted key and one or more YAML values; lists in brackets.
        params: of `params.yaml`; every set has to fit there.

    Raises:
        SweepRefused: a text without `=`, an unknown key, a value that does not fit, sets that are
            equal, or too many of them.
    """
    axes: dict[str, list[Any]] = {}
    for text in assignments:
        key, equals, values = text.partition("=")
        if not equals or not key or key in axes:
            raise SweepRefused(f"-S {text}: expected section.key=value,value once per key")
        axes[key] = _values(text, values)
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > _MOST_SETS:
        raise SweepRefused(f"{len(combinations)} sets: at most {_MOST_SETS}; name fewer values")
    sets = []
    for values_of_set in combinations:
        overrides = dict(zip(axes, values_of_set, strict=True))
        try:
            with_overrides(params, overrides)
        except KeyError as problem:
            raise SweepRefused(f"-S {problem.args[0]}: no such setting in params.yaml") from None
        except SettingsError as problem:
            raise SweepRefused(str(problem)) from None
        label = ", ".join(f"{key}={json.dumps(value)}" for key, value in overrides.items())
        sets.append(Arm(short_digest(overrides), label, overrides))
    names = [one.name for one in sets]
    if twice := next((one for one in sets if names.count(one.name) > 1), None):
        raise SweepRefused(f"{twice.label}: named twice")
    return tuple(sets)


def _values(text: str, values: str) -> list[Any]:
    try:
        # As YAML, so that a list in brackets stays one value at its commas.
        found: list[Any] = parse_yaml(f"[{values}]", f"-S {text}")
    except YamlRefused as problem:
        raise SweepRefused(str(problem)) from None
    if not found:
        raise SweepRefused(f"-S {text}: no value")
    return found


def short_digest(value: Any) -> str:
    """Ten digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def sweep_name(sets: Sequence[Arm]) -> str:
    """Same sets, same name: last parts of the keys and a digest."""
    keys = "-".join(key.rpartition(".")[2] for key in sets[0].overrides)
    return f"{keys}-{short_digest(sorted(one.name for one in sets))}"
