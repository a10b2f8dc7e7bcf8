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
from typing import Any

from components.images.aspect_buckets import Bucket, buckets
from components.planning.advice import refusals, too_large
from components.planning.flops import (
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
from components.planning.memory import (
    ITEM_BYTES,
    WHOLE_TENSORS,
    TrainingMemory,
    optimizer_bytes,
    state_bytes,
)
from components.planning.model_shapes import FluxShape, networks
from components.planning.stage_memory import (
    StageMemory,
    autoencoder_parameters,
    stage_memory,
    text_parameters,
)
from components.planning.transformer import Transformer
from components.settings.schema import Settings
from components.settings.training import DitStageSettings
from components.training.vae.tiles import TileRules

# Noise levels of a validation (components.training.dit.validation.LEVELS, which imports torch).
VALIDATION_LEVELS = 8
# UltraFlux's training and sampling times imply these for the 12B transformer at 4096 x 4096.
PUBLISHED_TRAINING_IMAGES_PER_S, PUBLISHED_SECONDS_PER_IMAGE, PUBLISHED_STEPS = 0.247, 49.5, 50
PUBLISHED_TOKENS = (16384, 512)
# How many the trainer keeps.
VAE_CHECKPOINTS = 2
# Read, hash, decode, cut and store one: benchmarks/vae_tiles.py on a core of an AMD EPYC.
TILES_CORE_S = 0.1
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
    memory: TrainingMemory
    """Of one process on its GPU."""
    processes_per_gpu: int
    host_bytes: int
    """In the memory of one machine."""
    disk: dict[str, int]
    """What to bytes."""
    hours: float | None
    rate: str | None
    """Where the rate behind the hours comes from."""
    core_hours: float = 0.0
    """Work of the processor before the GPU begins, on one core."""
    core_rate: str | None = None
    """Where the rate behind them was measured."""

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
        """On one GPU, all its processes."""
        return self.taken.gpu_bytes

    @property
    def taken(self) -> StageMemory:
        """GPU and host together."""
        return StageMemory(self.memory, self.processes_per_gpu, self.host_bytes)


@dataclass(frozen=True)
class Plan:
    """All stages of a settings file."""

    profile: str
    images: int
    origin: dict[str, str]
    buckets: tuple[BucketPlan, ...]
    stages: tuple[StagePlan, ...]
    states_by_zero: dict[int, tuple[int, int, int]]
    """(weights, gradients, optimizer) bytes on a GPU in stage 1 under each ZeRO stage, also those
    that the settings do not offer."""
    warnings: tuple[str, ...]


def plan(
    settings: Settings,
    root: Path,
    images: int,
    rate: Rate | None = None,
    *,
    limit: int | None = None,
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
    # `held_out` leaves at least one of them to train on.
    if images < 2:
        raise ValueError(f"images {images}: at least one to train on and one held out")
    transformer = Transformer(networks(settings, root), settings)
    sizes = tuple((bucket.height, bucket.width) for bucket in buckets(settings.buckets))
    stages = (
        _latents(transformer, sizes, images, rate),
        _text(transformer, sizes, images, rate),
        _vae(transformer, sizes, images, rate),
        _dit("dit_stage1", settings.dit_stage1, transformer, sizes, images, rate),
        _dit("dit_stage2", settings.dit_stage2, transformer, sizes, images, rate),
        _generate(transformer, sizes, rate),
    )
    # Listed first: a run that would not start needs no memory.
    warnings = refusals(transformer, sizes)
    first = settings.dit_stage1
    if limit is not None:
        for stage in stages:
            warnings += too_large(stage.stage, transformer, sizes, limit)
    warnings += [f"{stage}: {doubt}" for stage, doubt in settings.doubts()]
    return Plan(
        profile=settings.project.profile,
        images=images,
        origin=dict(transformer.networks.origin),
        buckets=tuple(_bucket(transformer, Bucket(*size)) for size in sizes),
        stages=stages,
        states_by_zero={
            zero: state_bytes(
                stages[3].parameters,
                transformer.gpus,
                zero,
                first.precision,
                transformer.trained_tensors(first),
                first.optimizer,
            )
            # All that the optimizer works with, for the table beside the plan.
            for zero in range(1 if first.optimizer in WHOLE_TENSORS else 4)
        },
        warnings=tuple(warnings),
    )


def held_out(settings: Settings, images: int) -> int:
    """Images held out by `slices`."""
    slices = settings.slices
    # As `slices` rounds it, so that the planned numbers are those of the run.
    return min(images - 1, max(round(slices.eval_fraction * images), slices.eval_min_images))


def _bucket(transformer: Transformer, bucket: Bucket) -> BucketPlan:
    size = (bucket.height, bucket.width)
    h, w = transformer.latent_hw(size)
    _, flops, _ = transformer.counts(size, transformer.settings.dit_stage1)
    return BucketPlan(bucket.name, (h // 2) * (w // 2), flops.forward, flops.model, flops.recompute)


def _hours(flops: int, gpus: int, rate: Rate | None) -> tuple[float | None, str | None]:
    # Without a stated rate there are no hours: an assumed one would be read as measured.
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
    hours, source = _hours(images * flops.model, 1, rate)
    return StagePlan(
        stage="latents",
        work="images encoded",
        items=images,
        flops_per_item=flops,
        validation=0,
        gpus=1,
        parameters=sum(autoencoder_parameters(transformer)),
        trained=0,
        **_memory("latents", transformer, sizes),
        disk={"latent store": round(record * images)},
        hours=hours,
        rate=source,
    )


def _text(
    transformer: Transformer, sizes: Sequence[tuple[int, int]], images: int, rate: Rate | None
) -> StagePlan:
    nets = transformer.networks
    flops = _encoding_flops(transformer)
    dtype = transformer.settings.latents.dtype
    # Padding is stored too: the transformer attends to it, so it is part of its input.
    record = transformer.text_tokens * nets.t5.d_model + transformer.pooled_width
    # The empty prompt is embedded too.
    hours, source = _hours((images + 1) * flops.model, 1, rate)
    return StagePlan(
        stage="text_embeddings",
        work="captions embedded (one per image, all different)",
        items=images + 1,
        flops_per_item=flops,
        validation=0,
        gpus=1,
        parameters=text_parameters(transformer),
        trained=0,
        **_memory("text_embeddings", transformer, sizes),
        disk={"text store": (images + 1) * record * _STORE_BYTES[dtype]},
        hours=hours,
        rate=source,
    )


def _encoding_flops(transformer: Transformer) -> Flops:
    """One prompt through all text encoders."""
    nets = transformer.networks
    length = transformer.settings.models.text_encoders.max_sequence_length
    return sum((clip_flops(clip) for clip in nets.clips), start=t5_flops(nets.t5, length))


def vae_slice(settings: Settings, images: int) -> int:
    """Photographs of the slice that the decoder trains on."""
    training = images - held_out(settings, images)
    # As `slices` rounds it.
    share = math.ceil(settings.slices.vae_top_fraction * training)
    return min(training, max(share, settings.slices.min_images))


def _memory(
    name: str, transformer: Transformer, sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Fields of a stage's plan."""
    taken = stage_memory(name, transformer, sizes)
    return {
        "memory": taken.memory,
        "processes_per_gpu": taken.processes,
        "host_bytes": taken.host_bytes,
    }


def _vae(
    transformer: Transformer, sizes: Sequence[tuple[int, int]], images: int, rate: Rate | None
) -> StagePlan:
    settings, vae = transformer.settings.vae, transformer.networks.autoencoder
    whole = transformer.settings
    # Of held-out photographs only as many as there are crops to measure on.
    cut = vae_slice(whole, images) + min(held_out(whole, images), settings.eval_crops)
    rules = TileRules(
        settings.crop_px,
        settings.tile_px,
        settings.tiles_per_photograph,
        whole.ingest.max_megapixels,
    )
    gpus, crop = transformer.gpus, (settings.crop_px, settings.crop_px)
    encoder, decoder = encoder_products(vae, *crop), decoder_products(vae, *crop)
    checkpointing = settings.gradient_checkpointing
    # The encoder is frozen: forward only.
    flops = total(encoder).inference + total(decoder, checkpointing=checkpointing)
    once = total(encoder).forward + total(decoder).forward
    # Before, after, and at every evaluation; each rank measures all crops.
    measured = 2 + -(-settings.steps // settings.eval_every)
    validation = measured * settings.eval_crops * once * gpus
    items = settings.steps * settings.batch_size
    trained, held = parameters(decoder), parameters(decoder) + parameters(encoder)
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
        **_memory("vae", transformer, sizes),
        disk={
            f"tiles of {cut:,} photographs (at most)": cut * rules.largest_photograph_bytes,
            "checkpoints (one more while writing)": (VAE_CHECKPOINTS + 1) * 12 * trained,
            "export": 4 * held,
        },
        hours=hours,
        rate=source,
        core_hours=cut * TILES_CORE_S / 3600,
        core_rate=(
            f"tiles at {TILES_CORE_S:g} s of one core a 4K photograph (measured with "
            "benchmarks/vae_tiles.py; divide by runtime.workers)"
        ),
    )


def _dit(
    name: str,
    stage: DitStageSettings,
    transformer: Transformer,
    sizes: Sequence[tuple[int, int]],
    images: int,
    rate: Rate | None,
) -> StagePlan:
    gpus = transformer.gpus
    degree = transformer.settings.runtime.context_parallel_degree
    flops = mean_flops(transformer.counts(size, stage)[1] for size in sizes)
    base = transformer.counts(sizes[0], None)[0]
    trained = transformer.trained(stage)
    held = base if stage.adapter is None else base + trained
    # At the start, every validate_every steps, at the end, and there once more for the average.
    validations = 2 + -(-stage.steps // stage.validate_every)
    measured = held_out(transformer.settings, images) + stage.validation_training_images
    samples = measured * VALIDATION_LEVELS * stage.validation_repeats
    validation = validations * samples * flops.forward
    items = stage.steps * stage.global_batch_size
    # Then the weights are the masters; every other way keeps a flat float32 copy (`state_bytes`).
    whole = stage.precision == "fp32" and stage.zero_stage == 0
    # Rank by rank and then summed, because each rank's vector is padded and scaled on its own;
    # without ZeRO all ranks have the same states, and one of them writes.
    shares = gpus if stage.zero_stage else 1
    states = optimizer_bytes(stage.optimizer, transformer.trained_tensors(stage), shares) * shares
    # The engine's weights (of an adapter alone, except with ZeRO-3), masters (where they are not
    # the weights), the optimizer's states, the average.
    kept = held if stage.zero_stage == 3 else trained
    checkpoint = ITEM_BYTES[stage.precision] * kept + states + (4 if whole else 8) * trained
    # The adapter alone lies beside the merged weights.
    exported = 4 * base + (4 * trained if stage.adapter is not None else 0)
    hours, source = _hours(
        items * flops.model + validation, gpus, rate or _published_training(transformer)
    )
    return StagePlan(
        stage=name,
        work=f"{stage.steps} steps of {stage.global_batch_size}"
        + (f", {degree} GPUs a sample" if degree > 1 else ""),
        items=items,
        flops_per_item=flops,
        validation=validation,
        gpus=gpus,
        parameters=held,
        trained=trained,
        **_memory(name, transformer, sizes),
        disk={
            "checkpoints (one more while writing)": (stage.keep_checkpoints + 1) * checkpoint,
            "export (raw and ema)": 2 * exported,
        },
        hours=hours,
        rate=source,
    )


def _generate(
    transformer: Transformer, sizes: Sequence[tuple[int, int]], rate: Rate | None
) -> StagePlan:
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
    held += text_parameters(transformer) + sum(autoencoder_parameters(transformer))
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
        **_memory("generate", transformer, sizes),
        disk={"images (uncompressed size; PNG is smaller)": raw},
        hours=hours,
        rate=source,
    )


def _published_training(transformer: Transformer) -> Rate | None:
    """The rate of the paper's training, for its own transformer only."""
    if transformer.networks.transformer != FluxShape():
        return None
    # Model FLOPs: what was repeated is not in it, so the rate compares with MFU.
    flops = PUBLISHED_TRAINING_IMAGES_PER_S * flux_flops(FluxShape(), *PUBLISHED_TOKENS).model
    return Rate(
        flops,
        f"paper: its training time implies {PUBLISHED_TRAINING_IMAGES_PER_S} images/s per GPU at "
        f"4096x4096 ({flops / 1e12:.0f} TFLOP/s); not measured here",
    )


def _published_sampling(transformer: Transformer) -> Rate | None:
    if transformer.networks.transformer != FluxShape():
        return None
    # Sampling is forward only. Text encoders and decoder are not counted here, so the rate is
    # rather too low than too high.
    steps = PUBLISHED_STEPS * flux_flops(FluxShape(), *PUBLISHED_TOKENS).forward
    flops = steps / PUBLISHED_SECONDS_PER_IMAGE
    return Rate(
        flops,
        f"paper: {PUBLISHED_SECONDS_PER_IMAGE} s per 4096x4096 image of {PUBLISHED_STEPS} steps "
        f"({flops / 1e12:.0f} TFLOP/s); not measured here",
    )
