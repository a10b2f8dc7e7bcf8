"""The one table of objectives: a name for `objective.kind`, its loss, and its settings.

A new objective is one function of the shape of those here and one row of `OBJECTIVES`. Settings of
its own go in a `Section` named in the row; params.yaml gives their values under `objective.NAME`.

No torch on import: the settings read this table to check a name, and so does every command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from components.settings.objective import ObjectiveSettings
    from components.settings.section import Section

    Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, ObjectiveSettings], Tensor]
    """(velocity, latents, noise, t, settings) to one loss per sample, (B,) float32."""


@dataclass(frozen=True)
class Objective:
    """A row of the table."""

    loss: Loss
    settings: type[Section] | None = None
    """Class of the section `objective.NAME`; None: it has none of its own."""
    compiled: Loss | None = None
    """The same as generated code, for GPUs with `runtime.compile`; None: there is none."""


def _snr_huber(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    settings: ObjectiveSettings,
    *,
    compiled: bool = False,
) -> Tensor:
    # The fused one trains; the plain expression is its reference in the tests and gives band
    # losses.
    from components.objectives.fused_snr_huber import fused_snr_huber_loss

    return fused_snr_huber_loss(velocity, latents, noise, t, settings.snr_huber, compiled=compiled)


def _wavelet(
    velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor, settings: ObjectiveSettings
) -> Tensor:
    from components.objectives.flow_matching import wavelet_flow_loss

    # The weights of SNR-HW's bands, so that the two differ in nothing but what they are named for.
    return wavelet_flow_loss(
        velocity,
        latents,
        noise,
        t,
        space=settings.wavelet_space,
        band_weights=settings.snr_huber.band_weights,
    )


def _flow_matching(
    velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor, settings: ObjectiveSettings
) -> Tensor:
    from components.objectives.flow_matching import flow_matching_loss

    # Every objective has one signature, so that the trainer calls the table without knowing the
    # row.
    del t, settings
    return flow_matching_loss(velocity, latents, noise)


OBJECTIVES: dict[str, Objective] = {
    "snr_huber": Objective(_snr_huber, compiled=partial(_snr_huber, compiled=True)),
    "flow_matching": Objective(_flow_matching),
    "wavelet": Objective(_wavelet),
}


def objective_loss(
    settings: ObjectiveSettings,
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    compiled: bool = False,
) -> Tensor:
    """The training objective per sample.

    Args:
        settings: whose `kind` is a name of the table.
        velocity: (B, C, h, w) predicted noise minus data.
        latents: (B, C, h, w) data.
        noise: (B, C, h, w).
        t: (B,) noise levels, 0 data to 1 noise.
        compiled: the row's generated code, where it has some.

    Returns:
        (B,) float32.
    """
    # The name was checked when the settings were read; a wrong one cannot come this far.
    row = OBJECTIVES[settings.kind]
    loss = row.compiled if compiled and row.compiled is not None else row.loss
    return loss(velocity, latents, noise, t, settings)
