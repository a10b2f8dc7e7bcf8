"""Settings of what trains: the decoder, the latent store and the stages of the DiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from components.settings.section import (
    CHANGES_NO_WEIGHT,
    CONTENT_COUNTS,
    Count,
    Fraction,
    HeightWidth,
    NonNegative,
    Section,
)

Checkpointing = Literal["none", "blocks", "selective"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "muon"]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Minutes = Annotated[float, Field(gt=0)]
OnDivergence = Literal["stop", "skip", "rollback"]
Watching = Annotated[Count, CHANGES_NO_WEIGHT]
"""How often, or how much, a run is looked at or saved."""


def _one_problem(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A wrong value is one line, and not one for each member of the union."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("must be a number greater than 0, or dynamic") from None


Shift = Annotated[
    Annotated[float, Field(gt=0)] | Literal["dynamic"],
    WrapValidator(_one_problem),
]


class ReconstructionSettings(Section):
    """VAE post-training loss (UltraFlux table 3: 0.2 wavelet, 0.1 perceptual, 1.0 L2)."""

    wavelet: NonNegative
    perceptual: NonNegative
    l2: NonNegative
    perceptual_kind: Literal["lpips", "random_vgg", "ms_ssim", "gmsd", "none"]
    lpips_backbone: Annotated[str | None, CONTENT_COUNTS]
    """Local backbone file for `lpips`."""
    lpips_sha256: str | None


class DivergenceSettings(Section):
    """When loss or gradient norm count as diverged, and how far `on_divergence` goes."""

    sigmas: Annotated[float, Field(gt=0)] | None = 8.0
    """Deviations above the running mean, in logarithms (a deviation counts as 0.1 at least); None:
    only a number that is not finite."""
    warmup_steps: Count = 100
    """Steps before the running statistics are trusted."""
    memory_steps: Annotated[int, Field(ge=2)] = 100
    """Steps over which the statistics forget."""
    max_events: Annotated[int, Field(ge=0)] = 5
    """Skips and rollbacks of a run together; one more stops it."""
    rollback_every: Count = 500
    """`rollback` returns to a multiple of so many steps (a checkpoint is made at each) ..."""
    rollback_margin: Annotated[int, Field(ge=0)] = 50
    """... at least so many steps before the divergence ..."""
    left_out_steps: Count = 10
    """... and trains on without the batches of so many steps up to it (PaLM, 2204.02311, section
    5.1, went back 100 steps and left out 200 to 500 batches)."""
    rollback_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """By what a rollback multiplies the learning rate from then on."""


class VaeSettings(Section):
    """Decoder-only post-training."""

    ordered = (("crop_px", "tile_px"),)

    crop_px: Annotated[int, Field(ge=64, multiple_of=16)]
    """Square training crops; paper: 512."""
    tile_px: Annotated[int, Field(ge=64, le=8192)] = 1024
    """Edge of the square tiles that crops are cut from, at least `crop_px`; twice that gives a crop
    room to move. A tile takes 3 tile_px^2 bytes of disk."""
    tiles_per_photograph: Count = 2
    """Tiles of each photograph at most; 2 of 1,024 px are 6.3 MB, 3.1 TB for 500,000."""
    max_rejected_fraction: Fraction = 0.01
    """Share of the photographs that may turn out undecodable (or kill their worker) before the
    stage fails; those within it, and those too narrow for a crop, are listed in `left_out.csv`."""
    batch_size: Count
    """Global batch; paper: 384."""
    micro_batch_size: Count
    """Crops that a process decodes at once; gradient accumulation makes up the difference."""
    precision: Literal["bf16", "fp32"]
    """Of the networks (autocast); weights, loss and optimizer stay float32."""
    gradient_checkpointing: bool
    """Recompute the decoder's blocks in the backward pass: less memory, about a third more time."""
    steps: Count
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: NonNegative
    loss: ReconstructionSettings
    eval_crops: Watching
    """Held-out crops on which PSNR is measured."""
    eval_every: Watching
    checkpoint_every: Watching
    checkpoint_every_minutes: Annotated[Minutes | None, CHANGES_NO_WEIGHT] = None
    """A checkpoint also when so much time has passed since the last one."""
    on_divergence: OnDivergence = "stop"
    """As in the stages of the transformer, and by the same guard."""
    divergence: DivergenceSettings = DivergenceSettings()


class LatentsSettings(Section):
    """The latent store."""

    batch_size: Count
    dtype: Literal["float32", "bfloat16"]
    shard_mb: Count
    """A shard is closed when it reaches this size in MiB."""
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the photographs that may turn out undecodable (or kill their worker) before the
    stage fails; those within it are listed in `store.json` and left out of training."""
    posterior: Literal["mode", "sample"] = "mode"
    """What is stored of the encoder's Gaussian: its mean, or one draw keyed by seed, image and
    bucket. Diffusion-4K's script draws anew at every step (`latent_dist.sample()`); UltraFlux does
    not say."""


class OwnPrompt(Section):
    """A validation prompt of one's own."""

    prompt: Annotated[str, Field(min_length=1)]
    size: HeightWidth | None = None
    """Pixels (height, width), multiples of 32; None: that of the first held-out image."""


class SampleSettings(Section):
    """Pictures from the averaged weights while training goes on."""

    every: Annotated[int, Field(ge=0)] | None
    """Steps between grids; one more at the end. 0: only at the end; None: no grid."""
    prompts: Count
    """Captions of the first held-out images, each at its image's size."""
    own_prompts: Annotated[tuple[OwnPrompt, ...], Strict(False)] = ()
    """Further prompts, behind the held-out captions in every grid. They are embedded once, before
    training begins, by the encoders of the text store."""
    num_inference_steps: Count
    guidance_scale: NonNegative


class AdapterSettings(Section):
    """Low-rank adapter (LoRA) that is trained instead of the weights."""

    rank: Count
    alpha: Count
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
    """Names, or last parts of names, of the layers that get factors, such as to_q."""
    trigger: Annotated[str | None, CHANGES_NO_WEIGHT] = None
    """Words that call up what was trained, for the exported file's metadata; None: the caption
    where all training images have the same one, else none."""

    def is_target(self, name: str) -> bool:
        """Whether the layer of this full name gets factors, by peft's rule."""
        return any(_is_named(name, target) for target in self.target_modules)

    def check(self, names: Sequence[str], where: str) -> None:
        """Refuse an adapter that names a layer which there is not.

        Args:
            names: full names of a network's layers.
            where: the network, for the message.

        Raises:
            ValueError: no layer has a name of `target_modules`.
        """
        for target in self.target_modules:
            # One by one: peft itself is content when one of them matches.
            if not any(_is_named(name, target) for name in names):
                raise ValueError(
                    f"adapter.target_modules: {where} has no layer {target!r}; "
                    "attention has to_q, to_k, to_v and to_out.0"
                )


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


class DitStageSettings(Section):
    """One stage of SACL training."""

    steps: Count
    global_batch_size: Count
    """Paper: 64."""
    micro_batch_size: Count
    """Per process; gradient accumulation makes up the difference."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Paper: 1e-6."""
    schedule: Literal["constant", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: NonNegative
    max_grad_norm: Annotated[float, Field(gt=0)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    ema_device: Literal["model", "cpu"]
    """Where each rank keeps its share of the average: beside the weights, or in host memory (4
    bytes times parameters over ranks less on the GPU, copied across once a step)."""
    precision: Literal["bf16", "fp32"]
    zero_stage: Literal[0, 1, 2, 3]
    """What DeepSpeed ZeRO divides over the ranks: 1 optimizer states, 2 also gradients, 3 also the
    weights. 0 divides nothing and keeps no float32 masters, so it needs precision fp32."""
    gradient_checkpointing: Checkpointing
    """Activations kept for the backward pass: all; only what enters a block (its forward runs
    twice); also what matrix products and attention give (no such product runs twice)."""
    offload_activations: Annotated[bool, CHANGES_NO_WEIGHT] = False
    """Inputs of checkpointed blocks wait in host memory between forward and backward: copies, so
    results are the same. Needs gradient_checkpointing."""
    offload_base: Annotated[bool, CHANGES_NO_WEIGHT] = False
    """The frozen weights of blocks wait in host memory and come to the GPU block by block, forward
    and backward: copies, so results are the same. Needs an adapter, gradient_checkpointing 'blocks'
    and zero_stage 0 to 2; not with a base in nf4."""
    optimizer: Optimizer
    """`adamw_8bit` (extra `gpu`) keeps AdamW's moments in 8 bits. `adafactor` keeps a value per row
    and column in place of moments; `muon` orthogonalises a momentum of hidden matrices and leaves
    all else to AdamW. These two need whole matrices, hence zero_stage 0."""
    betas: Annotated[tuple[Momentum, Momentum], Strict(False)] = (0.9, 0.999)
    """Decay of AdamW's first and second moment (torch's defaults). Not of `adafactor`."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of AdamW's second moment (torch's default). Not of `adafactor`."""
    muon_momentum: Momentum = 0.95
    """Of `muon` alone (torch's default)."""
    decayed_weights: Literal["all", "matrices"] = "all"
    """What `weight_decay` acts on: all weights, as the published training scripts have it, or all
    but norms and biases (whatever has fewer than two axes)."""
    offload_optimizer: Literal["none", "cpu"]
    """Where DeepSpeed keeps optimizer states and float32 masters; `cpu`: in host memory."""
    adapter: AdapterSettings | None
    """None: all weights are trained."""
    sigma_range: Annotated[tuple[Fraction, Fraction], Strict(False)]
    """Noise levels trained on, 0 data to 1 noise. SACL stage 2: [0.541, 1], UltraFlux' "0-459"
    (supplement, table 3) as entries of a descending table of 1,000 levels."""
    sigma_table: Literal["unshifted", "shifted"] = "unshifted"
    """What `sigma_range` counts in: levels as they are, which are also the entries of FLUX.1-dev's
    own (unshifted) training table; or entries of the table that the stage's shift moves, as SD3's
    scheduler and the released sampling script have it: "0-459" is then [0.780, 1] at shift 3."""
    timestep_density: Literal["uniform", "logit_normal", "shifted"]
    """Of the levels before `timestep_shift`. logit_normal: Esser et al. 2024 (2403.03206), equation
    19, location 0 and scale 1; uniform: Diffusion-4K's Flux script; shifted: uniform with shift
    3."""
    timestep_shift: Shift = 1.0
    """Moves the levels trained on as sampling moves its own (Esser et al. 2024, equation 23). 1:
    not; 3: as UltraFlux' released sampling script; dynamic: by the tokens of the bucket, as FLUX.1
    samples (`generate.schedule: dynamic`). UltraFlux does not say what it trains with."""
    initial_weights: Literal["pretrained", "stage1_ema", "stage1_raw"]
    guidance_scale: NonNegative
    """Value fed to the guidance embedding during training (validation, too). 3.5 in Diffusion-4K
    (supplement, and the default of its Flux script), 1 in this project: the target is the plain
    velocity, which no guidance has sharpened."""
    caption_dropout: Fraction = 0.0
    """Share of the samples whose caption is replaced by the empty prompt, so that classifier-free
    guidance has learnt what it contrasts with (Ho and Salimans 2022, 2207.12598, algorithm 1: 0.1
    or 0.2). UltraFlux states none and Diffusion-4K's scripts have none: 0."""
    validate_every: Watching
    validation_repeats: Watching
    """Fixed noise draws per held-out image and noise level."""
    validation_training_images: Annotated[int, Field(ge=0), CHANGES_NO_WEIGHT] = 0
    """So many training images are measured like the held-out ones: what has been learned by heart,
    beside what carries over."""
    watch_every: Watching
    """Steps between readings of the error by wavelet band and of memory; the other metrics are
    logged at every step."""
    checkpoint_every: Watching
    checkpoint_every_minutes: Annotated[Minutes | None, CHANGES_NO_WEIGHT] = None
    """A checkpoint also when so much time has passed since the last one."""
    keep_checkpoints: Watching
    async_checkpoints: Annotated[bool, CHANGES_NO_WEIGHT]
    """Write checkpoints in a thread while training goes on: same files, a copy of the state in
    host memory (pinned on CUDA)."""
    on_divergence: OnDivergence = "stop"
    """A loss or gradient norm that is not finite or far above its running mean: end the run; leave
    the batch out; or go back to a checkpoint before it and leave the batches around it out."""
    divergence: DivergenceSettings = DivergenceSettings()
    min_kept_movement: Annotated[Fraction, CHANGES_NO_WEIGHT] = 0.99
    """Share of what training has moved the weights by that export, merge, load and resume must
    keep; below it the stage fails. 0: measured only."""
    samples: Annotated[SampleSettings, CHANGES_NO_WEIGHT]
    max_shard_gb: Annotated[float, Field(gt=0), CHANGES_NO_WEIGHT]
    """Exported weights above this size (GB) are divided over several files."""

    @model_validator(mode="after")
    def _consistent(self) -> DitStageSettings:
        if self.sigma_range[0] >= self.sigma_range[1]:
            raise ValueError(f"sigma_range {list(self.sigma_range)} must be increasing")
        if self.timestep_density == "shifted" and self.timestep_shift != 1.0:
            raise ValueError(
                f"timestep_shift {self.timestep_shift} would shift the density 'shifted' twice: "
                "use timestep_density 'uniform'"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _engine_choices(self) -> DitStageSettings:
        """Refuse what DeepSpeed and the optimizer cannot do together."""
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 keeps no float32 masters of bf16 weights: use zero_stage 1, 2 or 3, "
                "or precision fp32"
            )
        if self.offload_activations and self.gradient_checkpointing != "blocks":
            raise ValueError(
                "offload_activations takes what gradient_checkpointing 'blocks' keeps to the host, "
                f"and gradient_checkpointing is {self.gradient_checkpointing!r}"
            )
        if self.offload_base and (
            self.adapter is None or self.gradient_checkpointing != "blocks" or self.zero_stage == 3
        ):
            raise ValueError(
                "offload_base lets frozen weights wait on the host: it needs an adapter (here "
                f"{'one' if self.adapter else 'none'}), gradient_checkpointing 'blocks' (here "
                f"{self.gradient_checkpointing!r}) and zero_stage 0 to 2 (here {self.zero_stage})"
            )
        if self.offload_optimizer == "cpu" and self.zero_stage < 2:
            raise ValueError(
                f"offload_optimizer 'cpu' needs zero_stage 2 or 3, not {self.zero_stage}"
            )
        if self.offload_optimizer == "cpu" and self.optimizer == "adamw_8bit":
            raise ValueError(
                "optimizer 'adamw_8bit' updates on the GPU: use 'adamw' with offload_optimizer "
                "'cpu', or offload_optimizer 'none'"
            )
        if self.optimizer in ("adafactor", "muon") and self.zero_stage:
            raise ValueError(
                f"optimizer {self.optimizer!r} needs whole matrices, and zero_stage "
                f"{self.zero_stage} cuts them: use zero_stage 0 (precision fp32), or 'adamw'"
            )
        return self
