"""What a settings file costs: operations, memory, disk and hours of every stage that uses a GPU.

Operations, parameters, states and store sizes are exact for the stated number of images, with
every aspect bucket equally frequent. Hours follow from a rate that the caller states; nothing
here has been timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.settings import DitStageSettings, Settings
from components.training.aspect_buckets import Bucket, buckets
from components.training.flops import (
    Flops,
    clip_flops,
    decoder_products,
    encoder_products,
    flux_flops,
    mean_flops,
    parameters,
    t5_flops,
    total,
)
from components.training.memory_plan import (
    ITEM_BYTES,
    TrainingMemory,
    communication_bytes,
    decoder_activation_bytes,
    flux_activation_bytes,
    state_bytes,
)
from components.training.model_shapes import CLIP_TOKENS, FluxShape, Networks, networks

# Noise levels of a validation (components.training.dit_validation.LEVELS, which imports torch).
VALIDATION_LEVELS = 8
# UltraFlux's training and sampling times imply these for the 12B transformer at 4096 x 4096.
PUBLISHED_TRAINING_IMAGES_PER_S, PUBLISHED_SECONDS_PER_IMAGE, PUBLISHED_STEPS = 0.247, 49.5, 50
PUBLISHED_TOKENS = (16384, 512)
VAE_CHECKPOINTS = 2
_STORE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Rate:
    """How fast a GPU works through model FLOPs."""

    flops_per_s: float
    source: str


@dataclass(frozen=True)
class BucketPlan:
    """One aspect bucket."""

    name: str
    image_tokens: int
    forward: int
    """Operations of one image through the transformer."""
    training: int
    """Forward + backward."""
    recompute: int
    """What activation checkpointing repeats (0 where it is off in stage 1)."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    stage: str
    work: str
    """What is counted, in words."""
    items: int
    flops_per_item: Flops
    """Mean over the buckets or sizes."""
    validation: int
    """Forward operations of validation or evaluation within the stage."""
    gpus: int
    parameters: int
    """Of all networks in GPU memory."""
    trained: int
    memory: TrainingMemory | None
    """None: weights only (`weights_bytes`)."""
    weights_bytes: int
    disk: dict[str, int]
    """What to bytes."""
    hours: float | None
    rate: str | None
    """Where the rate behind the hours comes from."""

    @property
    def model_flops(self) -> int:
        """All operations that MFU counts."""
        return self.items * self.flops_per_item.model + self.validation

    @property
    def hardware_flops(self) -> int:
        """With recomputation."""
        return self.items * self.flops_per_item.total + self.validation

    @property
    def gpu_hours(self) -> float | None:
        """Hours times GPUs."""
        return None if self.hours is None else self.hours * self.gpus

    @property
    def memory_bytes(self) -> int:
        """On one GPU, as far as it is known."""
        return self.weights_bytes if self.memory is None else self.memory.total


@dataclass(frozen=True)
class Plan:
    """All stages of a settings file."""

    profile: str
    images: int
    origin: dict[str, str]
    buckets: tuple[BucketPlan, ...]
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Transformer:
    """What the planner asks of a transformer, whatever its backbone."""

    networks: Networks
    settings: Settings

    @property
    def text_tokens(self) -> int:
        """L; SD3 puts the CLIP tokens before T5's."""
        length = self.settings.models.text_encoders.max_sequence_length
        return length if self.networks.transformer else length + CLIP_TOKENS

    @property
    def pooled_width(self) -> int:
        """P; SD3 joins the pooled vectors of its CLIPs."""
        return sum(clip.projection_dim or clip.hidden_size for clip in self.networks.clips)

    def latent_hw(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent pixels of an image (height, width)."""
        compression = self.networks.autoencoder.compression
        return size[0] // compression, size[1] // compression

    def counts(
        self, size: tuple[int, int], stage: DitStageSettings | None
    ) -> tuple[int, Flops, int]:
        """(parameters, operations of one sample, activation bytes of a micro batch).

        Args:
            size: (height, width) in pixels.
            stage: precision, micro batch and checkpointing; None: forward only.
        """
        h, w = self.latent_hw(size)
        checkpointing = stage is not None and stage.gradient_checkpointing
        shape = self.networks.transformer
        if shape is None:
            return self._counted((h, w), stage)
        tokens = (h // 2) * (w // 2)
        flops = flux_flops(shape, tokens, self.text_tokens, checkpointing=checkpointing)
        if stage is None:
            return shape.parameters, flops.inference, 0
        activations = flux_activation_bytes(
            shape,
            tokens + self.text_tokens,
            stage.micro_batch_size,
            stage.precision,
            checkpointing=checkpointing,
        )
        return shape.parameters, flops, activations

    def _counted(
        self, latent_hw: tuple[int, int], stage: DitStageSettings | None
    ) -> tuple[int, Flops, int]:
        """A backbone without a closed form, counted on the meta device (imports torch)."""
        from components.training.counted_flops import backbone_counts

        nets = self.networks
        held, flops, saved, block_inputs = backbone_counts(
            self.settings.models.transformer,
            nets.transformer_config,
            (nets.t5.d_model, self.pooled_width),
            (nets.autoencoder.latent_channels, *latent_hw),
            self.text_tokens,
        )
        if stage is None:
            return held, flops.inference, 0
        scale = stage.micro_batch_size * ITEM_BYTES[stage.precision] // ITEM_BYTES["bf16"]
        if stage.gradient_checkpointing:
            # Blocks are alike: one block's share is repeated at a time, its inputs are kept.
            inputs, blocks = block_inputs
            repeated = Flops(flops.forward, flops.backward, flops.forward)
            return held, repeated, scale * (inputs + saved // blocks)
        return held, flops, scale * saved


def plan(
    settings: Settings, root: Path, images: int, rate: Rate | None = None, *, limit: int | None = None
) -> Plan:
    """Plan every GPU stage.

    Args:
        settings: any valid settings.
        root: repository root, where relative weight folders start.
        images: images that the corpus stages keep.
        rate: how fast a GPU works; None: hours only where the paper implies a rate.
        limit: memory of one GPU in bytes; stages that need more are warned about.

    Raises:
        ValueError: too few images, or a config.json that cannot be used.
    """
    if images < 2:
        raise ValueError(f"images {images}: at least one to train on and one held out")
    transformer = Transformer(networks(settings, root), settings)
    sizes = tuple((bucket.height, bucket.width) for bucket in buckets(settings.buckets))
    stages = (
        _latents(transformer, sizes, images, rate),
        _text(transformer, images, rate),
        _vae(transformer, rate),
        _dit("dit_stage1", settings.dit_stage1, transformer, sizes, images, rate),
        _dit("dit_stage2", settings.dit_stage2, transformer, sizes, images, rate),
        _generate(transformer, rate),
    )
    warnings = _refusals(settings)
    if limit is not None:
        for stage in stages:
            warnings += _too_large(stage, transformer, sizes, limit)
    return Plan(
        profile=settings.project.profile,
        images=images,
        origin=dict(transformer.networks.origin),
        buckets=tuple(_bucket(transformer, Bucket(*size)) for size in sizes),
        stages=stages,
        warnings=tuple(warnings),
    )


def held_out(settings: Settings, images: int) -> int:
    """Images held out by `slices`."""
    slices = settings.slices
    return min(images - 1, max(round(slices.eval_fraction * images), slices.eval_min_images))


def _bucket(transformer: Transformer, bucket: Bucket) -> BucketPlan:
    size = (bucket.height, bucket.width)
    h, w = transformer.latent_hw(size)
    _, flops, _ = transformer.counts(size, transformer.settings.dit_stage1)
    return BucketPlan(bucket.name, (h // 2) * (w // 2), flops.forward, flops.model, flops.recompute)


def _hours(flops: int, gpus: int, rate: Rate | None) -> tuple[float | None, str | None]:
    if rate is None:
        return None, None
    return flops / (rate.flops_per_s * gpus) / 3600, rate.source


def _latents(
    transformer: Transformer, sizes: Sequence[tuple[int, int]], images: int, rate: Rate | None
) -> StagePlan:
    vae, dtype = transformer.networks.autoencoder, transformer.settings.latents.dtype
    flops = mean_flops(total(encoder_products(vae, *size)).inference for size in sizes)
    areas = [math.prod(transformer.latent_hw(size)) for size in sizes]
    record = vae.latent_channels * sum(areas) / len(areas) * _STORE_BYTES[dtype]
    held = parameters(encoder_products(vae, *sizes[0]) + decoder_products(vae, *sizes[0]))
    hours, source = _hours(images * flops.model, 1, rate)
    return StagePlan(
        stage="latents",
        work="images encoded",
        items=images,
        flops_per_item=flops,
        validation=0,
        gpus=1,
        parameters=held,
        trained=0,
        memory=None,
        weights_bytes=4 * held,
        disk={"latent store": round(record * images)},
        hours=hours,
        rate=source,
    )


def _text(transformer: Transformer, images: int, rate: Rate | None) -> StagePlan:
    nets = transformer.networks
    flops = _encoding_flops(transformer)
    dtype = transformer.settings.latents.dtype
    record = transformer.text_tokens * nets.t5.d_model + transformer.pooled_width
    held = nets.t5.parameters + sum(clip.parameters for clip in nets.clips)
    # The empty prompt is embedded too.
    hours, source = _hours((images + 1) * flops.model, 1, rate)
    return StagePlan(
        stage="text",
        work="captions embedded (one per image, all different)",
        items=images + 1,
        flops_per_item=flops,
        validation=0,
        gpus=1,
        parameters=held,
        trained=0,
        memory=None,
        weights_bytes=4 * held,
        disk={"text store": (images + 1) * record * _STORE_BYTES[dtype]},
        hours=hours,
        rate=source,
    )


def _encoding_flops(transformer: Transformer) -> Flops:
    """One prompt through all text encoders."""
    nets = transformer.networks
    length = transformer.settings.models.text_encoders.max_sequence_length
    return sum((clip_flops(clip) for clip in nets.clips), start=t5_flops(nets.t5, length))


def _vae(transformer: Transformer, rate: Rate | None) -> StagePlan:
    settings, vae = transformer.settings.vae, transformer.networks.autoencoder
    gpus, crop = transformer.settings.runtime.processes, (settings.crop_px, settings.crop_px)
    encoder, decoder = encoder_products(vae, *crop), decoder_products(vae, *crop)
    checkpointing = settings.gradient_checkpointing
    flops = total(encoder).inference + total(decoder, checkpointing=checkpointing)
    once = total(encoder).forward + total(decoder).forward
    # Before, after, and at every evaluation; each rank measures all crops.
    measured = 2 + -(-settings.steps // settings.eval_every)
    validation = measured * settings.eval_crops * once * gpus
    items = settings.steps * settings.batch_size
    trained, held = parameters(decoder), parameters(decoder) + parameters(encoder)
    micro = min(settings.micro_batch_size, max(1, settings.batch_size // gpus))
    memory = TrainingMemory(
        weights=4 * held,
        gradients=4 * trained,
        optimizer=8 * trained,
        average=0,
        activations=decoder_activation_bytes(vae, *crop, micro, checkpointing=checkpointing),
        # DistributedDataParallel copies gradients into buckets of the same size.
        buffers=4 * trained,
    )
    hours, source = _hours(items * flops.model + validation, gpus, rate)
    return StagePlan(
        stage="vae",
        work=f"crops of {settings.crop_px} px (perceptual network not counted)",
        items=items,
        flops_per_item=flops,
        validation=validation,
        gpus=gpus,
        parameters=held,
        trained=trained,
        memory=memory,
        weights_bytes=4 * held,
        disk={
            "checkpoints (one more while writing)": (VAE_CHECKPOINTS + 1) * 12 * trained,
            "export": 4 * held,
        },
        hours=hours,
        rate=source,
    )


def _dit(
    name: str,
    stage: DitStageSettings,
    transformer: Transformer,
    sizes: Sequence[tuple[int, int]],
    images: int,
    rate: Rate | None,
) -> StagePlan:
    gpus = transformer.settings.runtime.processes
    flops = mean_flops(transformer.counts(size, stage)[1] for size in sizes)
    held = transformer.counts(sizes[0], None)[0]
    # At the start, every validate_every steps, at the end, and there once more for the average.
    validations = 2 + -(-stage.steps // stage.validate_every)
    samples = held_out(transformer.settings, images) * VALIDATION_LEVELS * stage.validation_repeats
    validation = validations * samples * flops.forward
    items = stage.steps * stage.global_batch_size
    whole = stage.precision == "fp32" and stage.zero_stage == 0
    # The engine's weights (its masters where there is one copy), masters, moments; the average.
    checkpoint = (12 if whole else 12 + ITEM_BYTES[stage.precision]) + 4
    hours, source = _hours(
        items * flops.model + validation, gpus, rate or _published_training(transformer)
    )
    return StagePlan(
        stage=name,
        work=f"{stage.steps} steps of {stage.global_batch_size}",
        items=items,
        flops_per_item=flops,
        validation=validation,
        gpus=gpus,
        parameters=held,
        trained=held,
        memory=dit_memory(stage, transformer, sizes, gpus),
        weights_bytes=ITEM_BYTES[stage.precision] * held,
        disk={
            "checkpoints (one more while writing)": (stage.keep_checkpoints + 1)
            * checkpoint
            * held,
            "export (raw and ema)": 8 * held,
        },
        hours=hours,
        rate=source,
    )


def dit_memory(
    stage: DitStageSettings, transformer: Transformer, sizes: Sequence[tuple[int, int]], gpus: int
) -> TrainingMemory:
    """Memory of one GPU at the bucket with the most tokens."""
    largest = max(sizes, key=lambda size: size[0] * size[1])
    held, _, activations = transformer.counts(largest, stage)
    weights, gradients, optimizer = state_bytes(held, gpus, stage.zero_stage, stage.precision)
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        # Every rank holds the whole average in float32 (components.training.ema).
        average=4 * held,
        activations=activations,
        buffers=communication_bytes(held, gpus, stage.precision),
    )


def _generate(transformer: Transformer, rate: Rate | None) -> StagePlan:
    settings, nets = transformer.settings.generate, transformer.networks
    # Without a guidance input, classifier-free guidance takes a second pass.
    passes = settings.num_inference_steps
    if nets.transformer is None and settings.guidance_scale > 1:
        passes *= 2
    vae = nets.autoencoder
    each = [
        transformer.counts(size, None)[1] * passes
        + total(decoder_products(vae, *size)).inference
        + _encoding_flops(transformer)
        for size in settings.sizes
    ]
    items = settings.prompts * len(settings.sizes)
    flops = mean_flops(each)
    held = transformer.counts(settings.sizes[0], None)[0]
    held += nets.t5.parameters + sum(clip.parameters for clip in nets.clips)
    held += parameters(decoder_products(vae, 64, 64) + encoder_products(vae, 64, 64))
    hours, source = _hours(items * flops.model, 1, rate or _published_sampling(transformer))
    raw = sum(3 * height * width for height, width in settings.sizes) * settings.prompts
    return StagePlan(
        stage="generate",
        work=f"images of {settings.num_inference_steps} steps",
        items=items,
        flops_per_item=flops,
        validation=0,
        gpus=1,
        parameters=held,
        trained=0,
        memory=None,
        weights_bytes=4 * held,
        disk={"images (uncompressed size; PNG is smaller)": raw},
        hours=hours,
        rate=source,
    )


def _published_training(transformer: Transformer) -> Rate | None:
    """The rate of the paper's training, for its own transformer only."""
    if transformer.networks.transformer != FluxShape():
        return None
    flops = PUBLISHED_TRAINING_IMAGES_PER_S * flux_flops(FluxShape(), *PUBLISHED_TOKENS).model
    return Rate(
        flops,
        f"paper: its training time implies {PUBLISHED_TRAINING_IMAGES_PER_S} images/s per GPU at "
        f"4096x4096 ({flops / 1e12:.0f} TFLOP/s); not measured here",
    )


def _published_sampling(transformer: Transformer) -> Rate | None:
    if transformer.networks.transformer != FluxShape():
        return None
    steps = PUBLISHED_STEPS * flux_flops(FluxShape(), *PUBLISHED_TOKENS).forward
    flops = steps / PUBLISHED_SECONDS_PER_IMAGE
    return Rate(
        flops,
        f"paper: {PUBLISHED_SECONDS_PER_IMAGE} s per 4096x4096 image of {PUBLISHED_STEPS} steps "
        f"({flops / 1e12:.0f} TFLOP/s); not measured here",
    )


def _refusals(settings: Settings) -> list[str]:
    """Settings that the engine would refuse at its start."""
    found = []
    for name in ("dit_stage1", "dit_stage2"):
        stage: DitStageSettings = getattr(settings, name)
        share = stage.micro_batch_size * settings.runtime.processes
        if stage.zero_stage == 0 and stage.precision == "bf16":
            found.append(
                f"{name}: DeepSpeed refuses zero_stage 0 with precision bf16 and float32 "
                f"accumulation; set {name}.zero_stage to 1 or 2"
            )
        if stage.global_batch_size % share:
            found.append(
                f"{name}: global_batch_size {stage.global_batch_size} is not a multiple of "
                f"micro_batch_size {stage.micro_batch_size} x runtime.processes "
                f"{settings.runtime.processes}; set it to "
                f"{-(-stage.global_batch_size // share) * share}"
            )
    return found


_MOST_GPUS = 1024


def _too_large(
    stage: StagePlan, transformer: Transformer, sizes: Sequence[tuple[int, int]], limit: int
) -> list[str]:
    """A warning when a stage does not fit, with the first change of settings that makes it fit."""
    if stage.memory_bytes <= limit:
        return []
    gib = 2**30
    text = f"{stage.stage}: needs {stage.memory_bytes / gib:.1f} GiB of {limit / gib:.1f} GiB"
    if stage.stage.startswith("dit_"):
        return [f"{text}; {_cure(stage.stage, transformer, sizes, limit)}"]
    if stage.stage == "vae":
        changes = "vae.micro_batch_size, or set vae.gradient_checkpointing to true"
        return [f"{text}; lower {changes}"]
    if stage.stage == "generate":
        return [f"{text} for weights in float32; use ultraflux generate --dtype and --memory"]
    return [f"{text} for weights in float32; choose a larger GPU"]


def _cure(
    name: str, transformer: Transformer, sizes: Sequence[tuple[int, int]], limit: int
) -> str:
    """Changes, one after another, until the stage fits; what to do where none helps."""
    stage: DitStageSettings = getattr(transformer.settings, name)
    gpus = transformer.settings.runtime.processes
    changes: list[str] = []
    wanted = (
        ("precision", "bf16"),
        ("gradient_checkpointing", True),
        ("zero_stage", 2),
        ("micro_batch_size", 1),
    )
    for key, value in wanted:
        if getattr(stage, key) == value:
            continue
        stage = stage.model_copy(update={key: value})
        changes.append(f"{name}.{key}: {str(value).lower()}")
        if dit_memory(stage, transformer, sizes, gpus).total <= limit:
            return "set " + ", ".join(changes)
    while gpus < _MOST_GPUS:
        gpus *= 2
        if dit_memory(stage, transformer, sizes, gpus).total <= limit:
            return "set " + ", ".join([*changes, f"runtime.processes: {gpus}"])
    memory = dit_memory(stage, transformer, sizes, _MOST_GPUS)
    fixed = memory.weights + memory.average + memory.activations + memory.buffers
    return (
        "no number of GPUs helps: weights, their average and activations, which are not shared "
        f"out, take {fixed / 2**30:.1f} GiB; choose a GPU with more memory"
    )
