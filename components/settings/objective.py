"""Settings of the training objective."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from components.settings.open_section import OpenSection
from components.settings.section import NonNegative, Section


class SnrHuberSettings(Section):
    """SNR-aware Huber wavelet objective; alpha, beta, gamma are not published: ours."""

    ordered = (("c_min", "c_max"),)

    c_min: Annotated[float, Field(gt=0)] = 0.2
    c_max: Annotated[float, Field(gt=0)] = 1.0
    alpha: Annotated[float, Field(gt=0)] = 1.0
    beta: NonNegative = 1.0
    gamma: Annotated[float, Field(gt=0)] = 5.0
    time_weight: Literal["paper", "fm_exact"] = "paper"
    band_weights: Annotated[
        tuple[NonNegative, NonNegative, NonNegative, NonNegative], Strict(False)
    ] = (1.0, 1.0, 1.0, 1.0)
    """Weights of (LL, LH, HL, HH)."""


class ObjectiveSettings(OpenSection):
    """Training objective of the DiT."""

    chosen_by: ClassVar[str] = "kind"
    table: ClassVar[str] = "components.objectives.objective:OBJECTIVES"

    kind: str
    """A name of the table of objectives."""
    wavelet_space: Literal["x0", "v"]
    """Only for kind `wavelet` (Diffusion-4K's WLF)."""
    snr_huber: SnrHuberSettings
