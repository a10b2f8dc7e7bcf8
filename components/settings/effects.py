"""Which settings belong to the identity of a training run: the one rule.

A setting counts unless its field says otherwise (`Effect` in `components.settings.section`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from components.settings.schema import Settings
from components.settings.section import Effect


def effect(name: str) -> Effect | None:
    """What the setting with this dotted name says of its effect on weights; None: it may be any.

    A section that says so speaks for all that is in it. What only a backbone's own section knows
    has no field here and counts.
    """
    for field in _fields(name):
        for note in field.metadata:
            if isinstance(note, Effect):
                return note
    return None


def _fields(name: str) -> Iterator[FieldInfo]:
    """Fields on the way from the whole settings to a dotted name, as far as they are known."""
    section: Any = Settings
    for part in name.split("."):
        # A section that may be left out: `AdapterSettings | None`.
        members = [section, *get_args(section)]
        section = next(
            (m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None
        )
        if section is None:
            return
        field = section.model_fields.get(part)
        if field is None:
            return
        yield field
        section = field.annotation


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` (by dotted name) that can change a weight by what they are."""
    return {name: value for name, value in values.items() if effect(name) is None}


def naming(values: Mapping[str, Any]) -> dict[str, str]:
    """Those of `values` that name a file or folder whose content counts, where one is named."""
    return {
        name: str(value)
        for name, value in values.items()
        if value is not None and effect(name) is Effect.CONTENT
    }


_SHAPE = (
    # A checkpoint is the way from the weights that it began with; from others it leads nowhere.
    "initial_weights",
    "precision",
    "zero_stage",
    "optimizer",
    "offload_optimizer",
    "adapter",
    "decayed_weights",
)
"""Of a stage's own section: they decide which tensors a checkpoint holds, and what it began as."""
_NETWORKS = ("models.autoencoder", "models.transformer")
_MAY_MOVE = (
    "models.transformer.rope_variant",
    "models.transformer.rope_window",
    # A checkpoint holds what is trained, and rounded weights are frozen.
    "models.transformer.quantisation",
)


def shapes_state(stage: str, name: str) -> bool:
    """Whether a checkpoint made under another value of this setting cannot be loaded.

    Args:
        stage: name of a stage that trains, which is also its section.
        name: dotted name of a setting.
    """
    if name.startswith(tuple(f"{stage}.{part}" for part in _SHAPE)):
        return True
    return name.startswith(_NETWORKS) and name not in _MAY_MOVE


def start_name(stage: str, settings: Mapping[str, Any], weights: Collection[str]) -> str:
    """Name of what a run's weights begin as: an input, a folder of weights, or the seed.

    Args:
        stage: name of a stage that trains.
        settings: by dotted name.
        weights: settings that name a folder of weights.
    """
    before, _, which = str(settings.get(f"{stage}.initial_weights", "")).partition("_")
    if which:
        return f"data/dit_{before}/{which}"
    network = "autoencoder" if stage == "vae" else "transformer"
    pretrained = f"models.{network}.pretrained"
    return pretrained if pretrained in weights else "project.seed"


_SEEN_ONLY = {"dit_stage1": "models.autoencoder.", "dit_stage2": "models.autoencoder."}
"""What a stage only draws its progress pictures with: its latents come ready from a store."""


def only_seen(stage: str, name: str) -> bool:
    """Whether a setting reaches a stage's pictures alone, whatever it does to other stages."""
    return stage in _SEEN_ONLY and name.startswith(_SEEN_ONLY[stage])
