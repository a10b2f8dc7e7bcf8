"""Memory of every stage under given settings: of a process, of a GPU, of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from components.models.loading.memory_modes import MemoryModes, memory_modes
from components.planning.flops import decoder_products, encoder_products, parameters
from components.planning.memory import (
    GIB,
    ITEM_BYTES,
    TrainingMemory,
    clip_working_bytes,
    communication_bytes,
    decoder_activation_bytes,
    decoder_working_bytes,
    encoder_working_bytes,
    flux_sampling_bytes,
    optimizer_bytes,
    state_bytes,
    text_working_bytes,
    update_bytes,
)
from components.planning.model_shapes import AutoencoderShape
from components.planning.rounded import (
    saved_bytes,
    text_saved_bytes,
    waiting_bytes,
    widest_block,
)
from components.planning.transformer import Transformer
from components.settings.training import DitStageSettings

CAPTIONS_TOGETHER = 16
"""As `stores.text_store.build_text_store` embeds them."""
CONTEXT_BYTES = GIB
"""What a process takes of a GPU beside tensors, at least half of it: CUDA's context, kernels'
workspaces. Not planned; a verdict that it decides is left open."""
_ANY_SIZE = (512, 512)
Size = tuple[int, int]
Verdict = Literal["fits", "open", "does not fit"]


@dataclass(frozen=True)
class StageMemory:
    """What a stage takes."""

    memory: TrainingMemory
    """Of one process on its GPU."""
    processes: int = 1
    """That share a GPU."""
    host_bytes: int = 0
    """Tensors in the memory of one machine, at the fullest moment."""

    @property
    def gpu_bytes(self) -> int:
        """Of one GPU."""
        return self.processes * self.memory.total

    def verdict(self, limit: int) -> Verdict:
        """Whether a GPU of `limit` bytes is enough."""
        return verdict_of(self.gpu_bytes, self.processes, limit)


def verdict_of(needed: int, processes: int, limit: int) -> Verdict:
    """Whether a GPU of `limit` bytes is enough for tensors of `needed` bytes.

    Open: the tensors fit, and what is not planned beside them may not (`CONTEXT_BYTES` a process,
    and a twentieth that the allocator can lose to fragmentation).
    """
    if needed > limit:
        return "does not fit"
    return "fits" if needed + processes * CONTEXT_BYTES + needed // 20 <= limit else "open"


def stage_memory(name: str, transformer: Transformer, sizes: Sequence[Size]) -> StageMemory:
    """What a stage takes under the settings of `transformer`.

    Args:
        name: latents, text_embeddings, vae, dit_stage1, dit_stage2 or generate.
        transformer: shapes and settings.
        sizes: (height, width) of the aspect-ratio buckets.
    """
    if name.startswith("dit_"):
        stage: DitStageSettings = getattr(transformer.settings, name)
        return StageMemory(
            dit_memory(stage, transformer, sizes, transformer.gpus),
            host_bytes=transformer.settings.runtime.processes * dit_host_bytes(stage, transformer),
        )
    stages: dict[str, Callable[[], StageMemory]] = {
        "latents": lambda: _latents(transformer, sizes),
        "text_embeddings": lambda: _text_embeddings(transformer),
        "vae": lambda: _vae(transformer),
        "generate": lambda: _generate(transformer),
    }
    return stages[name]()


def largest(sizes: Sequence[Size]) -> Size:
    """The size that decides what must fit: a batch may be of any of them."""
    return max(sizes, key=lambda size: size[0] * size[1])


def encoders_per_gpu(transformer: Transformer) -> int:
    """Processes that share a GPU while photographs and captions are encoded."""
    runtime = transformer.settings.runtime
    if runtime.device == "cpu":
        return 1
    if runtime.engine == "ray":
        return max(1, int(1 / runtime.gpus_per_actor)) if runtime.gpus_per_actor else 1
    return runtime.encoders_per_gpu


def autoencoder_parameters(transformer: Transformer) -> tuple[int, int]:
    """(encoder's, decoder's), whatever the size of the pictures."""
    shape = transformer.networks.autoencoder
    # 64 px: a multiple of every compression.
    return parameters(encoder_products(shape, 64, 64)), parameters(decoder_products(shape, 64, 64))


def text_parameters(transformer: Transformer) -> int:
    """Of all text encoders."""
    nets = transformer.networks
    return nets.t5.parameters + sum(clip.parameters for clip in nets.clips)


def _encoding(transformer: Transformer, held: int, working: int) -> StageMemory:
    """Workers that hold a float32 network each; the stage's own process holds one on the host."""
    processes = encoders_per_gpu(transformer)
    gpus = max(1, transformer.settings.runtime.gpus)
    copies = processes * gpus + 1 if transformer.settings.runtime.device == "cuda" else 1
    return StageMemory(_forward_only(4 * held, working), processes, copies * 4 * held)


def _latents(transformer: Transformer, sizes: Sequence[Size]) -> StageMemory:
    shape, batch = transformer.networks.autoencoder, transformer.settings.latents.batch_size
    working = max(encoder_working_bytes(shape, *size, batch, 4) for size in sizes)
    return _encoding(transformer, sum(autoencoder_parameters(transformer)), working)


def _text_embeddings(transformer: Transformer) -> StageMemory:
    working = embedding_bytes(transformer, CAPTIONS_TOGETHER, 4)
    return _encoding(transformer, text_parameters(transformer), working)


def embedding_bytes(transformer: Transformer, batch: int, item: int) -> int:
    """Peak of all text encoders with a batch of prompts, weights aside."""
    nets = transformer.networks
    length = transformer.settings.models.text_encoders.max_sequence_length
    # While the CLIPs run, T5's states are there.
    states = item * batch * length * nets.t5.d_model
    clips = max(clip_working_bytes(clip, batch, item) for clip in nets.clips)
    return max(text_working_bytes(nets.t5, length, batch, item), states + clips)


def _vae(transformer: Transformer) -> StageMemory:
    settings, shape = transformer.settings.vae, transformer.networks.autoencoder
    encoder, trained = autoencoder_parameters(transformer)
    # A process cannot decode more at once than its share of the batch.
    micro = min(settings.micro_batch_size, max(1, settings.batch_size // transformer.gpus))
    crop = (settings.crop_px, settings.crop_px)
    memory = TrainingMemory(
        weights=4 * (encoder + trained),
        gradients=4 * trained,
        # Two moments; the weights are float32 and their own masters.
        optimizer=8 * trained,
        average=0,
        activations=decoder_activation_bytes(
            shape,
            *crop,
            micro,
            checkpointing=settings.gradient_checkpointing,
            perceptual=settings.loss.perceptual_kind,
        ),
        # DistributedDataParallel copies gradients into buckets of the same size.
        buffers=4 * trained,
        update=4 * trained,
    )
    runtime = transformer.settings.runtime
    return StageMemory(memory, host_bytes=runtime.processes * 4 * (encoder + trained))


def _generate(transformer: Transformer) -> StageMemory:
    item = sampling_item(transformer)
    held = transformer.counts(_ANY_SIZE, None)[0] + text_parameters(transformer)
    held += sum(autoencoder_parameters(transformer))
    needed = generate_bytes(transformer, memory_modes(transformer.settings.generate.memory))
    weights = min(item * held, needed)
    # Loaded on the host, then moved.
    return StageMemory(_forward_only(weights, needed - weights), host_bytes=item * held)


def sampling_item(transformer: Transformer) -> int:
    """Bytes of a weight as `components.generation.sampling` loads it."""
    return 2 if transformer.settings.runtime.device == "cuda" else 4


def generate_bytes(transformer: Transformer, modes: MemoryModes) -> int:
    """Peak of one picture at a time on the GPU, under modes of `ultraflux generate --memory`."""
    item = sampling_item(transformer)
    sizes = transformer.settings.generate.sizes
    shape = transformer.networks.autoencoder
    network = item * transformer.counts(_ANY_SIZE, None)[0]
    encoders = item * text_parameters(transformer)
    models = transformer.settings.models
    wide = 0
    if models.transformer.quantisation != "none":
        network -= saved_bytes(transformer, models.transformer.quantisation, item)
        # One layer's weights, widened for its product.
        wide = item * max(inputs * outputs for _, inputs, outputs in transformer.linear_layers())
    if models.text_encoders.quantisation != "none":
        encoders -= text_saved_bytes(
            transformer.networks.t5, models.text_encoders.quantisation, item
        )
    vae = item * sum(autoencoder_parameters(transformer))
    embedding = embedding_bytes(transformer, 1, item)
    sampling = wide + max(sampling_bytes(transformer, size, item) for size in sizes)
    decoding = max(_decoding_bytes(shape, size, item, tiled=modes.vae_tiling) for size in sizes)
    if modes.offload == "block":
        t5 = transformer.networks.t5
        # A layer at a time, of which the largest is the table of words or one of the MLP's.
        layer = item * t5.d_model * max(t5.vocab_size, t5.d_ff)
        blocks = sum(i * o for name, i, o in transformer.linear_layers() if "blocks." in name)
        # Of the blocks two: one travels while the one before computes.
        network -= item * max(0, blocks - 2 * widest_block(transformer))
        return vae + max(layer + embedding, network + sampling, decoding)
    if modes.offload == "model":
        # One network at a time.
        return max(encoders + embedding, network + sampling, vae + decoding)
    if modes.text_first:
        return max(encoders + embedding, network + vae + max(sampling, decoding))
    return encoders + network + vae + max(embedding, sampling, decoding)


def _decoding_bytes(shape: AutoencoderShape, size: Size, item: int, *, tiled: bool) -> int:
    if not tiled or max(size) <= shape.sample_size:
        return decoder_working_bytes(shape, *size, 1, item)
    tile = shape.sample_size
    # Decoded tiles wait to be joined; rows of them are joined, then all rows.
    pictures = 3 * item * 3 * size[0] * size[1]
    return decoder_working_bytes(shape, tile, tile, 1, item) + pictures


def dit_memory(
    stage: DitStageSettings, transformer: Transformer, sizes: Sequence[tuple[int, int]], gpus: int
) -> TrainingMemory:
    """Memory of one GPU at the bucket with the most tokens.

    Activations with `adapter` and `selective` are an upper bound: frozen layers keep a little less.
    """
    held, _, activations = transformer.counts(largest(sizes), stage)
    trained = transformer.trained_tensors(stage)
    if stage.adapter is not None:
        # The adapter's weights come on top of the frozen ones.
        held += trained.elements
    weights, gradients, optimizer = state_bytes(
        held, gpus, stage.zero_stage, stage.precision, trained, stage.optimizer
    )
    update = update_bytes(trained, gpus, stage.precision, stage.zero_stage, stage.optimizer)
    offloaded = stage.offload_optimizer == "cpu"
    kind = transformer.settings.models.transformer.quantisation
    item = ITEM_BYTES[stage.precision]
    if kind != "none" and stage.adapter is not None:
        weights -= saved_bytes(transformer, kind, item)
        # torchao widens a layer's weights for its product, and autograd keeps them for the block
        # that is repeated; bitsandbytes widens them anew.
        activations += item * widest_block(transformer) if kind != "nf4" else 0
    if stage.offload_base:
        weights -= waiting_bytes(transformer, kind, item)
    if stage.offload_activations:
        activations -= _waiting_bytes(stage, transformer, largest(sizes))
    buffers = communication_bytes(held, gpus, stage.precision, stage.zero_stage)
    groups = gpus // transformer.settings.runtime.context_parallel_degree
    accumulates = stage.global_batch_size > stage.micro_batch_size * groups
    if stage.precision == "fp32" and stage.zero_stage >= 2 and accumulates:
        # Gradients of a micro batch stay apart from those before until its pass is through.
        buffers += gradients
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        # Offloaded states are in host memory, and are updated there.
        optimizer=0 if offloaded else optimizer,
        # Each rank averages its share (`training.sharded.ema`); on "cpu" it is in host memory.
        average=4 * -(-trained.elements // gpus) if stage.ema_device == "model" else 0,
        activations=activations,
        buffers=buffers,
        update=0 if offloaded else update,
    )


def _waiting_bytes(stage: DitStageSettings, transformer: Transformer, size: Size) -> int:
    """Inputs of blocks that wait in host memory and not on the GPU; two are there at once."""
    shape = transformer.networks.transformer
    if shape is None:
        # Not known in closed form: an upper bound stays.
        return 0
    h, w = transformer.latent_hw(size)
    tokens = (h // 2) * (w // 2) + transformer.text_tokens
    stream = ITEM_BYTES[stage.precision] * stage.micro_batch_size * tokens * shape.width
    return max(0, shape.num_layers + shape.num_single_layers - 2) * stream


def dit_host_bytes(stage: DitStageSettings, transformer: Transformer) -> int:
    """Host memory that one training process needs at least, beside what Python itself takes.

    While it loads it holds all weights in float32; later what is offloaded, its part of the average
    where that is on the host, and copies of its states while a checkpoint is written behind
    training's back.
    """
    gpus = transformer.gpus
    base = transformer.counts(_ANY_SIZE, None)[0]
    trained = transformer.trained_tensors(stage)
    share = -(-trained.elements // gpus)
    states = 4 * share + optimizer_bytes(stage.optimizer, trained, gpus)
    kept = 4 * share if stage.ema_device == "cpu" else 0
    kept += states if stage.offload_optimizer == "cpu" else 0
    kept += states + 4 * share if stage.async_checkpoints else 0
    return max(4 * base, kept)


def sampling_bytes(transformer: Transformer, size: tuple[int, int], item: int) -> int:
    """Peak of one forward pass without gradients, weights aside."""
    shape = transformer.networks.transformer
    # Without a guidance input it is classifier-free, which doubles what goes through the network.
    contrasts = shape is None and transformer.settings.generate.guidance_scale > 1
    batch = 2 if contrasts else 1
    h, w = transformer.latent_hw(size)
    if shape is not None:
        tokens = (h // 2) * (w // 2) + transformer.text_tokens
        return flux_sampling_bytes(shape, tokens, batch, item)
    # A block's share of what training keeps: nearly all of it is there at once.
    stage = transformer.settings.dit_stage1.model_copy(
        update={"micro_batch_size": batch, "gradient_checkpointing": "blocks"}
    )
    return transformer.counts(size, stage)[2] * item // ITEM_BYTES[stage.precision]


def _forward_only(weights: int, working: int) -> TrainingMemory:
    """Memory of networks that are not trained."""
    return TrainingMemory(weights, 0, 0, 0, working, 0)
