"""Ablations as sets of parameters: the additive ladder, and the 2x2 of data and model.

The full system is `params.yaml` as it stands; every other arm takes components away from it, so an
ablation always belongs to the settings that are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.settings.schema import parse_settings

Design = Literal["ladder", "data-model"]

_PLAIN_OBJECTIVE: dict[str, Any] = {"objective.kind": "flow_matching"}
# Stage 2 stays, on all images and noise levels: every arm takes the same number of steps.
_PLAIN_CURRICULUM: dict[str, Any] = {
    "slices.stage2_top_fraction": 1.0,
    "dit_stage2.sigma_range": [0.0, 1.0],
}
_PLAIN_ROPE: dict[str, Any] = {"models.transformer.rope_variant": "flux"}
_UNSELECTED: dict[str, Any] = {
    "select.max_flat_fraction": 1.0,
    "select.min_entropy_bits": 0.0,
    "select.min_quality": None,
    "select.aesthetic_top_fraction": 1.0,
    "select.human.max_flat_fraction": None,
    "select.human.min_entropy_bits": 0.0,
    "select.human.min_quality": None,
    "select.human.aesthetic_top_fraction": None,
}


@dataclass(frozen=True)
class Arm:
    """One pipeline run."""

    name: str
    label: str
    """As the paper's table names it."""
    overrides: dict[str, Any]
    """Changes to `params.yaml` by dotted key; none for the full system."""

    @property
    def arguments(self) -> list[str]:
        """The same as `-S key=value` of `dvc exp run`."""
        return [f"-S {key}={json.dumps(value)}" for key, value in self.overrides.items()]


DESIGNS: dict[Design, tuple[Arm, ...]] = {
    # UltraFlux, ablation table of the main paper.
    "ladder": (
        Arm("base", "Flux + F16 VAE", _PLAIN_OBJECTIVE | _PLAIN_CURRICULUM | _PLAIN_ROPE),
        Arm("snr-hw", "+ SNR-HW", _PLAIN_CURRICULUM | _PLAIN_ROPE),
        Arm("sacl", "+ SNR-HW + SACL", _PLAIN_ROPE),
        Arm("rope", "+ SNR-HW + SACL + Resonance 2D RoPE w. YaRN", {}),
    ),
    # UltraFlux, supplement, table 1.
    "data-model": (
        Arm(
            "a-baseline",
            "A: unselected data, Flux with latent L2",
            _UNSELECTED | _PLAIN_OBJECTIVE | _PLAIN_CURRICULUM | _PLAIN_ROPE,
        ),
        Arm(
            "b-data",
            "B: selected data, Flux with latent L2",
            _PLAIN_OBJECTIVE | _PLAIN_CURRICULUM | _PLAIN_ROPE,
        ),
        Arm("c-model", "C: unselected data, UltraFlux", _UNSELECTED),
        Arm("d-full", "D: selected data, UltraFlux", {}),
    ),
}


def _value(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    for part in key.split("."):
        value = value[part]
    return value


def with_overrides(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of nested parameters with dotted keys replaced.

    Raises:
        KeyError: a key that is not there.
        SettingsError: the result is not valid.
    """
    copied: dict[str, Any] = json.loads(json.dumps(params))
    for key, value in overrides.items():
        *sections, last = key.split(".")
        try:
            section = _value(copied, ".".join(sections)) if sections else copied
        except (KeyError, TypeError):
            raise KeyError(key) from None
        # Not `in` alone: a number has no keys, and a text holds parts of itself.
        if not isinstance(section, dict) or last not in section:
            raise KeyError(key)
        section[last] = value
    parse_settings(copied)
    return copied


def expand(design: Design, params: Mapping[str, Any]) -> tuple[Arm, ...]:
    """The arms of a design over the parameters in use.

    Raises:
        ValueError: two arms would be the same run, because `params.yaml` lacks a component.
    """
    seen: dict[str, str] = {}
    for arm in DESIGNS[design]:
        content = json.dumps(with_overrides(params, arm.overrides), sort_keys=True)
        if content in seen:
            raise ValueError(
                f"arms '{seen[content]}' and '{arm.name}' are the same run: params.yaml lacks what "
                "tells them apart; start from the full system (`ultraflux config compose`)"
            )
        seen[content] = arm.name
    return DESIGNS[design]


def planned_stages(
    arms: Sequence[Arm],
    params: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    upstream: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, str]]:
    """Which arm runs a stage first; later arms with the same inputs find it in DVC's run cache.

    Args:
        arms: in the order in which they run.
        params: of `params.yaml`.
        stages: `stages` of dvc.yaml, of which `params` is read.
        upstream: stages by name in an order in which they can run, with the stages they read.

    Returns:
        {arm: {stage: arm that runs it}}. An upper bound: where a changed stage writes the same
        bytes, DVC skips those below it.
    """
    makers: dict[str, str] = {}
    plan: dict[str, dict[str, str]] = {}
    for arm in arms:
        values = with_overrides(params, arm.overrides)
        keys: dict[str, str] = {}
        plan[arm.name] = {}
        for stage, above in upstream.items():
            read = {name: _value(values, name) for name in stages[stage].get("params", [])}
            parts = [stage, read, [keys[name] for name in above]]
            keys[stage] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            plan[arm.name][stage] = makers.setdefault(keys[stage], arm.name)
    return plan
