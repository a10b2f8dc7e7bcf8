"""Settings of what follows training: generate, refiner, evaluate, promote."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from components.settings.captions import EndpointSettings
from components.settings.section import (
    Count,
    HeightWidth,
    NonNegative,
    Section,
)

MemoryMode = Literal["text-first", "model-offload", "block-offload", "vae-slicing", "vae-tiling"]
AttentionBackend = Literal["native", "flash", "flash_3", "cudnn", "sage"]
StepCache = Literal["none", "first_block", "taylorseer"]


class GenerateSettings(Section):
    """Sampling."""

    sizes: Annotated[tuple[HeightWidth, ...], Strict(False), Field(min_length=1)]
    """(height, width) in pixels, multiples of 32."""
    prompts: Count
    """How many held-out captions are sampled (all sizes each)."""
    twins: Annotated[int, Field(ge=0)] = 0
    """How many captions of *training* images are sampled, each in its image's own bucket size, and
    the first `prompts` of them in the three sizes least like it. Such a picture shows what was
    memorised, and that corpus, latents, texts, objective and sampler fit together; it says nothing
    of captions that training never saw."""
    num_inference_steps: Count
    guidance_scale: NonNegative
    shift: Annotated[float, Field(gt=0)]
    """FlowMatchEuler shift; the released script: 3.0."""
    schedule: Literal["static", "dynamic"]
    """`static`: `shift` for every size (the released script). `dynamic`: a shift that grows with
    the number of image tokens, as in stock Flux."""
    weights: Literal["ema", "raw"]
    seed: Annotated[int, Field(ge=0)]
    memory: Annotated[tuple[MemoryMode, ...], Strict(False)] = ()
    """Ways to sample with less memory, as of `ultraflux generate --memory`. Only `vae-tiling`
    changes a picture."""
    attention_backend: AttentionBackend = "native"
    """Of the transformer, through diffusers' dispatcher. All but `native` need a CUDA GPU; `flash`,
    `flash_3` and `sage` a package of their own. `flash`, `flash_3` and `cudnn` differ from `native`
    by rounding, `sage` is approximate (8-bit queries and keys)."""
    step_cache: StepCache = "none"
    """Leaves blocks out of some steps (diffusers' cache hooks, Flux alone); approximate. How far
    off the pictures are is measured by `ultraflux evaluate runtime --way`."""
    step_cache_threshold: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of `first_block`: largest relative change of the first block's contribution at which the
    other blocks are left out (diffusers' default)."""
    step_cache_interval: Annotated[int, Field(ge=2, le=100)] = 5
    """Of `taylorseer`: steps from one computed step to the next (diffusers' default)."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: every block of the transformer as compiled code; differs by rounding."""

    @model_validator(mode="after")
    def _multiples(self) -> GenerateSettings:
        for height, width in self.sizes:
            if height % 32 or width % 32:
                raise ValueError(f"size {height}x{width}: both edges must be multiples of 32")
        return self


class RefinerSettings(Section):
    """Prompt refiner of `ultraflux generate --refine` (UltraFlux supplement 12)."""

    ordered = (("min_words", "max_words"),)

    endpoint: EndpointSettings
    language: Literal["English", "Chinese"]
    min_words: Count
    """The supplement asks for 55 to 100; what lies outside is asked again, then left as it was."""
    max_words: Count
    prompt_file: str | None
    """Text file, relative to the project, with the exact system prompt to send instead."""
    batch_size: Annotated[int, Field(ge=1, le=50)]
    """Prompts per request."""
    max_cost_usd: NonNegative
    """Over all runs with the same settings."""


class EvaluateSettings(Section):
    """Evaluation and report."""

    reconstruction_images: Count
    """Held-out images for PSNR, SSIM and NMSE of the VAE."""
    bootstrap_resamples: Annotated[int, Field(ge=100)]
    report_image_px: Annotated[int, Field(ge=64)]
    """Long edge of pictures inside the HTML report."""
    lattice: bool = False
    """Measure periodic patterns (2, 16 and 32 px) of generated images too, so that
    `promote.non_inferiority` may name `lattice_2px`, `lattice_16px` or `lattice_32px`."""


class BaselineSettings(Section):
    """Scores that a candidate is compared with."""

    scores: Annotated[str, Field(min_length=1)]
    """Parquet file below the repository root, kept in Git or DVC: `data/evaluate/scores.parquet` of
    the champion (`ultraflux promote --keep-baseline` writes it)."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file, so that a baseline never changes unnoticed and a new one re-runs the gate."""


class NonInferioritySettings(Section):
    """One metric that must not become worse than the baseline's by more than a margin."""

    system: str
    """As in the scores table, such as `generated` or `reconstruction_after`."""
    metric: str
    """Id of a metric card, which also says the better direction."""
    margin: NonNegative
    """In the metric's unit."""


class PromoteSettings(Section):
    """Promotion gate."""

    alias: Literal["candidate", "champion"]
    min_vae_psnr_gain_db: float
    min_validation_loss_drop: float | None
    """Relative fall of the DiT validation loss over both stages, 0 to 1; None: not asked, for runs
    on a handful of photographs, which memorise them while held-out loss rises."""
    min_training_images_loss_drop: float | None = None
    """The same of `validation_training_images` in stage 1."""
    min_twin_psnr_db: float | None = None
    """Of the worst of `generate.twins` beside its photograph, both at 1/8 size; also asks that the
    photograph nearest to each twin is its own. None: not asked."""
    baseline: BaselineSettings | None
    """None: there is none yet; `non_inferiority` is then stated as not compared."""
    non_inferiority: Annotated[tuple[NonInferioritySettings, ...], Strict(False)]
    significance: Annotated[float, Field(gt=0.0, lt=0.5)]
    """One-sided level of the lower bounds; 0.05 is a 95% bound."""
    correction: Literal["holm", "none"]
    """`holm`: every rule may be read as a claim of its own. `none`: suffices for the decision,
    because all rules must hold at once."""
    resamples: Annotated[int, Field(ge=100)]
    """Of the bootstrap over prompts; with m rules under `holm` at least m / significance."""
