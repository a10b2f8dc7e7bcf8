"""The stages' own code on a GPU that is not there, and what was alive at its fullest moment.

Nothing here knows what a network keeps: text encoding, photograph encoding, a training step with
the trainer's own loss, backward pass and optimizer, sampling and decoding run as in the stages, on
fake tensors (`fake_gpu`). What the fake process cannot do is done by arithmetic that is said:
ZeRO's division over ranks (`zero_engine`), DistributedDataParallel's buckets.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from components.models.backbone import Backbone
from components.models.backbones import BACKBONES
from components.models.loading.memory_modes import memory_modes
from components.planning.fake_gpu import GPU, FakeGpu, fake_gpu
from components.planning.model_shapes import AutoencoderShape, ClipShape, T5Shape
from components.planning.rounded import frozen_wait_on_host, round_fake, wait_on_host
from components.planning.stage_memory import CAPTIONS_TOGETHER
from components.planning.transformer import Transformer
from components.settings.training import DitStageSettings, ReconstructionSettings


@dataclass(frozen=True)
class Trace:
    """One piece of a stage on one GPU, for one process."""

    stage: str
    what: str
    """What was traced, in words."""
    held_bytes: int
    """Alive before: weights, and what an optimizer keeps."""
    peak_bytes: int
    """At the fullest moment, `held_bytes` included."""
    at: str
    """The project's line there."""
    host_bytes: int
    """Most bytes of tensors in host memory meanwhile."""
    waits: dict[str, int] = field(default_factory=dict)
    """"operator at line" to times that the host waited for the GPU."""
    doubles: dict[str, int] = field(default_factory=dict)
    """Likewise to operations in float64 on the GPU."""
    seconds: float = 0.0
    """That the trace took."""

    @property
    def working_bytes(self) -> int:
        """What the piece needs beside what was there."""
        return self.peak_bytes - self.held_bytes


def host_peak_bytes() -> int:
    """Most memory that this process has taken so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes everywhere but on macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _traced(live: FakeGpu, stage: str, what: str, found: list[Trace]) -> Iterator[None]:
    """Trace what happens inside the block."""
    live.restart()
    held, begin = live.live["cuda"], time.perf_counter()
    yield
    found.append(
        Trace(
            stage,
            what,
            held,
            live.peak["cuda"],
            live.at,
            live.peak["cpu"],
            dict(live.waits),
            dict(live.doubles),
            time.perf_counter() - begin,
        )
    )


class _AnyTokenizer:
    """Token ids of any words: no value of theirs changes what is alive."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.ones(len(texts), max_length, dtype=torch.long))


def text_encoders(transformer: Transformer, dtype: torch.dtype) -> Any:
    """Encoders of the settings' backbone on the current device, without values."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    backbone, nets = _backbone(transformer), transformer.networks
    family = backbone.text_family()
    clips = iter(nets.clips)
    parts: dict[str, Any] = {}
    for name in family.folders:
        if "tokenizer" in name:
            length = transformer.settings.models.text_encoders.max_sequence_length
            is_t5 = name.replace("tokenizer", "text_encoder") == backbone.t5_part
            parts[name] = _AnyTokenizer(length if is_t5 else nets.clips[0].max_position_embeddings)
        elif name == backbone.t5_part:
            parts[name] = T5EncoderModel(_t5_config(nets.t5))
        else:
            shape = next(clips)
            kind = CLIPTextModelWithProjection if shape.projection_dim else CLIPTextModel
            # The one CLIP of Flux has a projection in its configuration alone.
            parts[name] = (CLIPTextModel if not backbone.further_clips else kind)(
                _clip_config(shape)
            )
    encoders = SimpleNamespace(**parts)
    for model in family.models(encoders):
        _frozen(model, dtype)
    return encoders


def _frozen(model: Any, dtype: torch.dtype) -> Any:
    """As loaders leave a network that is not trained."""
    for parameter in model.parameters():
        # Not by `to`, which exchanges fake parameters and finds them counted.
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _backbone(transformer: Transformer) -> Backbone:
    return BACKBONES[transformer.settings.models.transformer.backbone]


def _t5_config(shape: T5Shape) -> Any:
    from transformers import T5Config

    return T5Config(**vars(shape), feed_forward_proj="gated-gelu", dropout_rate=0.0)


def _clip_config(shape: ClipShape) -> Any:
    from transformers import CLIPTextConfig

    heads = next(n for n in (shape.hidden_size // 64, 4, 2, 1) if n and shape.hidden_size % n == 0)
    values = vars(shape) | {"projection_dim": shape.projection_dim or shape.hidden_size}
    last = shape.vocab_size - 1
    return CLIPTextConfig(
        **values, num_attention_heads=heads, bos_token_id=last - 1, eos_token_id=last
    )


def autoencoder(shape: AutoencoderShape, groups: int, dtype: torch.dtype) -> Any:
    """An autoencoder of a shape on the current device, without values."""
    from components.models.autoencoder_f16 import AutoencoderKLF16

    levels = len(shape.block_out_channels)
    model = AutoencoderKLF16(
        **vars(shape),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=groups,
    )
    return _frozen(model, dtype)


def _autoencoder(transformer: Transformer, dtype: torch.dtype) -> Any:
    models = transformer.settings.models.autoencoder
    # Published ones have 32 groups; a folder's own number changes no size.
    groups = 32 if models.pretrained is not None else models.tiny.norm_num_groups
    return autoencoder(transformer.networks.autoencoder, groups, dtype)


def trace_text(transformer: Transformer) -> list[Trace]:
    """A batch of captions through all text encoders, as a worker of `text_embeddings` does it."""
    found: list[Trace] = []
    with fake_gpu() as live, torch.no_grad():
        with GPU:
            # As `TextFamily.load` gives them: float32.
            encoders = text_encoders(transformer, torch.float32)
        family = _backbone(transformer).text_family()
        length = transformer.settings.models.text_encoders.max_sequence_length
        with _traced(live, "text_embeddings", f"{CAPTIONS_TOGETHER} captions embedded", found):
            states = family.encode(encoders, [""] * CAPTIONS_TOGETHER, length)
        del states
    return found


def trace_latents(transformer: Transformer, size: tuple[int, int]) -> list[Trace]:
    """A batch of photographs of a size through the encoder, as a worker of `latents` does it."""
    from components.training.encoding.latents import encode

    found: list[Trace] = []
    count = transformer.settings.latents.batch_size
    with fake_gpu() as live:
        with GPU:
            model = _autoencoder(transformer, torch.float32)
        images = torch.empty(count, 3, *size)
        what = f"{count} photograph{'s' * (count > 1)} of {size[0]}x{size[1]} encoded"
        with _traced(live, "latents", what, found):
            latents = encode(model, images.to(GPU)).cpu()
        del latents
    return found


def trace_vae(transformer: Transformer) -> list[Trace]:
    """One optimizer step of decoder training by the stage's own code, in one process.

    What DistributedDataParallel adds is done by arithmetic: it copies gradients into buckets of the
    same size. Traced in float32, also where the settings say bf16: fake tensors have no autocast,
    which would need no more.
    """
    from components.training.vae.trainer import (
        MAX_GRAD_NORM,
        TrainableDecoder,
        add_gradient,
        freeze_encoder,
    )

    found: list[Trace] = []
    settings = transformer.settings.vae
    micro = min(settings.micro_batch_size, max(1, settings.batch_size // transformer.gpus))
    with fake_gpu() as live, torch.enable_grad():
        with GPU:
            model = _autoencoder(transformer, torch.float32)
            freeze_encoder(model)
            if settings.gradient_checkpointing:
                model.enable_gradient_checkpointing()
            decoder = TrainableDecoder(model)
            optimizer = torch.optim.AdamW(decoder.parameters(), foreach=True)
            loss = _reconstruction_loss(settings.loss)
            buckets = [torch.zeros_like(parameter) for parameter in decoder.parameters()]
            for parameter in decoder.parameters():
                parameter.grad = torch.zeros_like(parameter)
        # Makes the moments, which every step after the first finds.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        edge = settings.crop_px
        images = torch.empty(micro, 3, edge, edge, device=GPU)
        with _traced(live, "vae", f"step of {micro} crops of {edge} px, fp32", found):
            terms = add_gradient(model, decoder, loss, images, 1.0, "fp32")
            nn.utils.clip_grad_norm_(decoder.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        del terms, images, buckets, loss, optimizer, decoder, model
    return found


def _reconstruction_loss(settings: ReconstructionSettings) -> Any:
    """The loss of decoder training; LPIPS without its backbone's file, which has no say here."""
    from components.objectives.reconstruction import ReconstructionLoss

    if settings.perceptual_kind != "lpips":
        return ReconstructionLoss(settings).to(GPU)
    import lpips

    loss = ReconstructionLoss(settings.model_copy(update={"perceptual_kind": "none"}))
    loss.settings = settings
    # As `build_lpips` makes it.
    with warnings.catch_warnings():
        # Of torchvision, about how the package calls it.
        warnings.simplefilter("ignore")
        loss.perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # Some of its constants are made on the host, whatever the device.
    return loss.eval().requires_grad_(False).to(GPU)


def trace_generate(
    transformer: Transformer, size: tuple[int, int], *, steps: int = 2, with_encoders: bool = True
) -> list[Trace]:
    """Prompts to a picture as `generate` makes it: text, sampling steps, decoding.

    Args:
        transformer: networks and settings.
        size: (height, width) in pixels.
        steps: sampling steps; all after the first are alike.
        with_encoders: False: they were dropped before; also under the settings' `text-first`.
    """
    found: list[Trace] = []
    modes = memory_modes(transformer.settings.generate.memory)
    models = transformer.settings.models
    if modes.text_first and with_encoders:
        found, with_encoders = trace_first_text(transformer), False
    settings = transformer.settings
    dtype = torch.bfloat16 if settings.runtime.device == "cuda" else torch.float32
    backbone = _backbone(transformer)
    family = backbone.text_family()
    length = settings.models.text_encoders.max_sequence_length
    with fake_gpu() as live, torch.no_grad():
        with GPU:
            network = _frozen(transformer.model(dtype), dtype)
            encoders = text_encoders(transformer, dtype) if with_encoders else None
        with GPU:
            vae = _autoencoder(transformer, dtype)
        vae.use_tiling = modes.vae_tiling
        round_fake(network, models.transformer.quantisation, dtype, GPU)
        if modes.offload == "block":
            wait_on_host(network, GPU)
        for model in family.models(encoders) if encoders is not None else ():
            round_fake(model, models.text_encoders.quantisation, dtype, GPU)
            if modes.offload == "block":
                wait_on_host(model, GPU)
        pipeline = backbone.pipeline_class().from_components(vae, network, encoders)
        pipeline.set_progress_bar_config(disable=True)
        # SD3's looks for its first step by values, which are not there.
        pipeline.scheduler.index_for_timestep = lambda *_: 0
        if modes.offload == "model":
            pipeline.enable_model_cpu_offload(device=GPU)
        if encoders is not None:
            with _traced(live, "generate", "a prompt embedded", found):
                text, pooled = family.encode(pipeline, [""], length)
        else:
            widths = (transformer.networks.t5.d_model, transformer.pooled_width)
            with GPU:
                text = torch.empty(1, transformer.text_tokens, widths[0], dtype=dtype)
                pooled = torch.empty(1, widths[1], dtype=dtype)
        contrast = {}
        if family.negative_prompt is not None:
            contrast = {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled}
        named = f"{size[0]}x{size[1]}"
        with _traced(live, "generate", f"sampling steps of {named}", found):
            latents = pipeline(
                prompt_embeds=text,
                pooled_prompt_embeds=pooled,
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=settings.generate.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(0)],
                output_type="latent",
                **contrast,
            ).images
        del latents, text, pooled, contrast
        h, w = transformer.latent_hw(size)
        with GPU:
            raw = torch.empty(
                1, transformer.networks.autoencoder.latent_channels, h, w, dtype=dtype
            )
        with _traced(live, "generate", f"{named} decoded", found):
            image = vae.decode(raw, return_dict=False)[0]
            # Scaled on the device before it leaves for the host.
            image = pipeline.image_processor.postprocess(image, output_type="pt")
        del image, raw, pipeline, vae, network, encoders
    return found


def trace_first_text(transformer: Transformer) -> list[Trace]:
    """A prompt through text encoders that nothing else is beside of (`text-first`)."""
    found: list[Trace] = []
    settings = transformer.settings
    modes = memory_modes(settings.generate.memory)
    kind = settings.models.text_encoders.quantisation
    dtype = torch.bfloat16 if settings.runtime.device == "cuda" else torch.float32
    on_gpu = kind != "none" or modes.offload == "block"
    family = _backbone(transformer).text_family()
    with fake_gpu() as live, torch.no_grad():
        with GPU if on_gpu else torch.device("cpu"):
            encoders = text_encoders(transformer, dtype)
        for model in family.models(encoders):
            round_fake(model, kind, dtype, GPU)
            if kind == "none" and modes.offload == "block":
                wait_on_host(model, GPU)
        where = "" if on_gpu else " on the host"
        with _traced(live, "generate", f"a prompt embedded first{where}", found):
            states = family.encode(
                encoders, [""], settings.models.text_encoders.max_sequence_length
            )
        del states, encoders
    return found


def trace_training(transformer: Transformer, name: str, size: tuple[int, int]) -> list[Trace]:
    """One optimizer step of a DiT stage by the trainer itself, on one of its ranks.

    The second step after the start, when everything that is kept is there. ZeRO 3 is traced as
    ZeRO 2 and its weights are divided afterwards: what is gathered is bounded by a setting of
    DeepSpeed's (`engine_limits.GATHERED_ELEMENTS`). With context parallelism the whole sample is
    traced.

    Args:
        transformer: networks and settings.
        name: `dit_stage1` or `dit_stage2`.
        size: (height, width) of the bucket.
    """
    from components.planning.zero_engine import ZeroEngine
    from components.training.distributed.divergence import DivergenceGuard
    from components.training.distributed.ranks import Ranks
    from components.training.dit.trainer import DitTrainer
    from components.training.sharded.ema import WeightAverage
    from components.training.sharded.engine import UpdateGate
    from components.training.sharded.weight_shards import master_shards

    stage: DitStageSettings = getattr(transformer.settings, name)
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    found: list[Trace] = []
    with fake_gpu() as live, torch.enable_grad():
        with GPU:
            model = trained_network(transformer, stage, dtype)
            engine = ZeroEngine(model, stage, transformer.gpus, GPU)
        ranks = Ranks(0, 1, GPU)
        # Shares of this rank: it averages what it has masters of.
        average = WeightAverage(
            master_shards(engine, ranks),
            stage.ema_decay,
            ranks,
            torch.device("cpu") if stage.ema_device == "cpu" else None,
        )
        job = SimpleNamespace(
            name=name, settings=stage, objective=transformer.settings.objective, state_dir=None
        )
        parts: Any = SimpleNamespace(
            job=job,
            ranks=ranks,
            engine=engine,
            average=average,
            guard=DivergenceGuard(stage.divergence, 0),
            gate=UpdateGate(engine),
            metrics=None,
            steps_done=0,
            dtype=dtype,
            # Generated code needs no more memory than the operators, which can be traced.
            compiles_objective=False,
        )
        trainer = DitTrainer(parts)
        batches = [
            _noised_batch(transformer, size, stage.micro_batch_size)
            # Two speak for any number: the second finds the gradients of the first.
            for _ in range(min(2, engine.accumulation_steps))
        ]
        engine.accumulation_steps = len(batches)
        h, w = size
        what = f"step of {len(batches)} x {stage.micro_batch_size} at {h}x{w}"
        with _traced(live, name, what, found):
            # A watched step, which computes the errors by wavelet band as well.
            trainer._optimize(stage.watch_every - 1, batches)
        del trainer, parts, batches, average, engine, model
    return found


def trained_network(
    transformer: Transformer, stage: DitStageSettings, dtype: torch.dtype
) -> nn.Module:
    """The transformer as `assembly` hands it to the engine, on the current device."""
    from components.models.loading.quantisation import is_quantised
    from components.training.dit.adapters import add_adapter
    from components.training.sharded.activation_checkpointing import (
        enable_activation_checkpointing,
    )

    model: nn.Module = transformer.model(dtype)
    kind = transformer.settings.models.transformer.quantisation
    if kind != "none":
        round_fake(model, kind, dtype, GPU)
    if stage.adapter is not None:
        add_adapter(model, stage.adapter, 0)
        for parameter in model.parameters():
            if not is_quantised(parameter):
                parameter.data = parameter.data.to(dtype)
    if stage.offload_base:
        frozen_wait_on_host(model, GPU)
    enable_activation_checkpointing(
        model, stage.gradient_checkpointing, to_host=stage.offload_activations
    )
    return model.train()


def _noised_batch(transformer: Transformer, size: tuple[int, int], count: int) -> Any:
    """A micro batch in host memory, in the stored precision."""
    from components.training.dit.velocity import NoisedBatch

    nets = transformer.networks
    stored = getattr(torch, transformer.settings.latents.dtype)
    latent = (count, nets.autoencoder.latent_channels, *transformer.latent_hw(size))
    text = torch.empty(count, transformer.text_tokens, nets.t5.d_model, dtype=stored)
    return NoisedBatch(
        ("",) * count,
        torch.empty(latent, dtype=stored),
        torch.empty(latent),
        torch.empty(count),
        text,
        torch.empty(count, transformer.pooled_width, dtype=stored),
    )
