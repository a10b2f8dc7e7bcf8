"""GPU memory in closed form: training, and networks that only run forward.

Exact: weights, gradients, optimizer states and the weight average (bytes per parameter, measured
on the engine itself), and what autograd keeps of a transformer block (equal to a count on the fake
GPU). The rest follows from which tensors are alive at the fullest moment, and agrees within 3% with
a trace of the stages' own code (`exact`, tests/components/planning/test_exact.py). Not included:
CUDA's own context (about half a gigabyte to one), kernels' workspaces, and what the allocator
loses to fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from components.planning.model_shapes import (
    MLP_RATIO,
    AutoencoderShape,
    ClipShape,
    FluxShape,
    T5Shape,
)
from components.settings.training import Checkpointing, Optimizer
from components.training.distributed.engine_limits import (
    ALLREDUCE_ELEMENTS,
    BUCKET_ELEMENTS,
    GATHERED_ELEMENTS,
)

Precision = Literal["bf16", "fp32"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp32": 4}
GIB = 2**30
# State words of the attention's random numbers, kept whether or not there is dropout.
_WORDS = 24


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process on its GPU."""

    weights: int
    gradients: int
    optimizer: int
    """What the optimizer keeps, and the float32 masters of bf16 weights."""
    average: int
    """The exponential moving average: this rank's share of it, 0 where it is in host memory."""
    activations: int
    """At the fullest moment of a forward or backward pass."""
    buffers: int
    """In which gradients and gathered weights travel."""
    update: int = 0
    """Copies at the optimizer's update, when activations and buffers are gone."""

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the fullest moment."""
        passing = max(self.activations + self.buffers, self.update)
        return self.states + self.average + passing


def moment_bytes(elements: int, *, eight_bits: bool) -> int:
    """Adam's two moments of one tensor, float32 or as bitsandbytes keeps them in 8 bits.

    In 8 bits: a byte per value, a float32 scale per block of 256, and two tables of 256 values;
    tensors below 4096 values stay float32. ZeRO hands the optimizer one flat tensor per rank, so
    this is exact there; without ZeRO a model's small tensors take a little more.
    """
    # bitsandbytes' own limit, its `min_8bit_size`.
    if not eight_bits or elements < 4096:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // 256) + 4 * 256)


@dataclass(frozen=True)
class TrainedTensors:
    """Sizes of trained parameters, as far as an optimizer's states depend on them."""

    elements: int
    """Of all."""
    matrices: int
    """Of those with two axes."""
    factors: int
    """Row and column means of all with at least two axes: n / (last axis) + n / (last but one)."""
    vectors: int
    """Elements of those with fewer axes."""

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]]) -> TrainedTensors:
        """Of parameters of these shapes."""
        elements = matrices = factors = vectors = 0
        for shape in shapes:
            count = math.prod(shape)
            elements += count
            if len(shape) < 2:
                vectors += count
            else:
                factors += count // shape[-1] + count // shape[-2]
            if len(shape) == 2:
                matrices += count
        return cls(elements, matrices, factors, vectors)


WHOLE_TENSORS: frozenset[Optimizer] = frozenset({"adafactor", "muon"})
"""Optimizers that work with ZeRO 0 alone: every rank keeps all of their states."""


def optimizer_bytes(optimizer: Optimizer, trained: TrainedTensors, shares: int = 1) -> int:
    """What an optimizer keeps on one rank, in float32 where nothing else is said; masters aside.

    AdamW: two moments. Muon: a momentum for matrices, AdamW's moments for the rest. Adafactor: the
    row and column means of a tensor's squared gradients, a vector's squares themselves.

    Args:
        optimizer: kind.
        trained: parameters.
        shares: ranks that divide AdamW's moments (1 with ZeRO 0).
    """
    if optimizer == "adafactor":
        return 4 * (trained.factors + trained.vectors)
    if optimizer == "muon":
        return 4 * trained.matrices + 8 * (trained.elements - trained.matrices)
    # Of the share and not the whole: scales are per block of a rank's flat tensor.
    return moment_bytes(-(-trained.elements // shares), eight_bits=optimizer == "adamw_8bit")


def state_bytes(
    parameters: int,
    processes: int,
    zero_stage: int,
    precision: Precision,
    trained: TrainedTensors,
    optimizer: Optimizer = "adamw",
) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) bytes on each GPU under DeepSpeed ZeRO.

    Gradients are accumulated in float32. ZeRO-1 with bf16 keeps its float32 gradients whole, and
    beside them the bf16 ones of a micro batch; ZeRO-2 keeps its share of the float32 ones.

    Args:
        parameters: of the network.
        processes: ranks that share what is sharded.
        zero_stage: 0 shares nothing, 1 the optimizer, 2 gradients too, 3 weights too.
        precision: of weights.
        trained: those of the parameters that have gradients and optimizer states.
        optimizer: kind.
    """
    low = precision == "bf16"
    sharded_from = {"optimizer": 1, "gradients": 2, "weights": 3}

    def count(what: str, whole: int) -> int:
        # Rounded up: DeepSpeed pads the flat vector so that every rank has an equal share.
        return -(-whole // processes) if zero_stage >= sharded_from[what] else whole

    weights = ITEM_BYTES[precision] * count("weights", parameters)
    gradients = 4 * count("gradients", trained.elements)
    if low and zero_stage < 2:
        gradients += 2 * trained.elements
    kept = optimizer_bytes(optimizer, trained, processes if zero_stage else 1)
    # In float32 the weights are their own masters, but ZeRO keeps a flat copy of its share.
    masters = 4 * count("optimizer", trained.elements) if low or zero_stage else 0
    return weights, gradients, kept + masters


def flux_block_bytes(
    shape: FluxShape, tokens: int, batch: int, precision: Precision
) -> tuple[int, int]:
    """What autograd keeps of one (double, single) block with fused kernels, exactly in bf16.

    Double: 15 tensors of width D per token (inputs of the projections and products, q and k before
    their norm, q, k, v, the attention's output, and its copy in two streams, which a batch of one
    does without: there the streams are views of the joint tensor), the MLP's input and output of
    its activation (8 D), and in float32 four norm statistics, and per head two RMS statistics and
    the log-sum-exp. Single: 10 D, 9 D (MLP and joint input of the last projection). Then a few
    vectors per sample. In float32 the log-sum-exp of another kernel is a little longer.

    Args:
        shape: the transformer.
        tokens: image and text tokens.
        batch: samples.
        precision: of the network.
    """
    item, d, rows = ITEM_BYTES[precision], shape.width, batch * tokens
    per_head = 12 * rows * shape.num_attention_heads
    copies = 15 if batch > 1 else 14
    double = (copies + 2 * MLP_RATIO) * item * rows * d + 16 * rows + per_head
    single = (10 + 2 * MLP_RATIO + 1) * item * rows * d + 8 * rows + per_head
    return double + 18 * item * batch * d + _WORDS, single + 5 * item * batch * d + _WORDS


def flux_product_bytes(
    shape: FluxShape, tokens: int, batch: int, precision: Precision
) -> tuple[int, int]:
    """What matrix products and attention give in one (double, single) block, exactly.

    This is what selective checkpointing keeps. Double: q, k, v, attention, its projection (D
    each per token), the MLP's hidden layer (4 D) and output, and 12 D of modulation per sample.
    Single: q, k, v, attention, hidden layer, the joint projection, and 3 D of modulation. Both:
    the float32 log-sum-exp of each head. Arguments as `flux_block_bytes`.
    """
    item, d, rows = ITEM_BYTES[precision], shape.width, batch * tokens
    log_sum_exp = 4 * rows * shape.num_attention_heads
    double = (6 + MLP_RATIO) * item * rows * d + log_sum_exp
    single = (5 + MLP_RATIO) * item * rows * d + log_sum_exp
    return double + 12 * item * batch * d + _WORDS, single + 3 * item * batch * d + _WORDS


def flux_activation_bytes(
    shape: FluxShape,
    tokens: int,
    batch: int,
    precision: Precision,
    *,
    checkpointing: Checkpointing,
    not_kept: tuple[int, int] = (0, 0),
) -> int:
    """Peak of activations in the backward pass: what blocks keep, and gradients in flight.

    With checkpointing every block keeps its input, and one block at a time is repeated;
    `selective` keeps `flux_product_bytes` too. The backward pass comes to the single blocks first,
    when everything of the double ones is still there.

    Args:
        shape: the transformer.
        tokens: image and text tokens.
        batch: samples.
        precision: of the network.
        checkpointing: what is kept.
        not_kept: of a (double, single) block, in widths of a token: what a frozen block keeps less.
    """
    item, stream = ITEM_BYTES[precision], batch * tokens * shape.width
    double, single = (
        whole - item * stream * less
        for whole, less in zip(
            flux_block_bytes(shape, tokens, batch, precision), not_kept, strict=True
        )
    )
    # Rotary tables, float32 cos and sin.
    tables = 8 * tokens * shape.attention_head_dim
    # Gradients of the MLP's hidden layer and of the streams; three of them end a single block.
    in_double, in_single = ((MLP_RATIO + n) * item * stream + tables for n in (1, 3))
    doubles, singles = shape.num_layers, shape.num_single_layers
    if checkpointing == "none":
        return doubles * double + singles * single + in_single
    # 12B at 16,896 tokens: under 9 GB in all, where keeping everything takes over 120 GB (tested).
    kept_double = kept_single = item * stream
    if checkpointing == "selective":
        products = flux_product_bytes(shape, tokens, batch, precision)
        kept_double, kept_single = kept_double + products[0], kept_single + products[1]
        # Not made again.
        double, single = double - products[0], single - products[1]
    before = doubles * kept_double
    return max(before + double + in_double, before + singles * kept_single + single + in_single)


# Channels of VGG16's five features at 1/1 to 1/16 of the edge, and of maps that its convolutions
# and poolings keep besides (indices of a pooling are 8 bytes), per pixel of the crop.
_VGG_FEATURES = 64 + 128 / 4 + 256 / 16 + 512 / 64 + 512 / 256
_VGG_KEPT = 360
_VGG_PARAMETERS = 14_714_688


def lpips_bytes(pixels: int) -> int:
    """What LPIPS adds to decoder training: its network, and what it keeps of `pixels` in float32.

    Of the reconstruction everything that VGG16 makes; of both pictures the five features and their
    normalised form, their difference and its square.
    """
    return round(4 * pixels * (_VGG_KEPT + 5 * _VGG_FEATURES)) + 4 * _VGG_PARAMETERS


def decoder_activation_bytes(
    shape: AutoencoderShape,
    height: int,
    width: int,
    batch: int,
    *,
    checkpointing: bool,
    perceptual: str = "none",
) -> int:
    """Peak of decoder training beside weights, gradients and states.

    Inputs of norms, activations and convolutions, level by level. Counted in float32, also under
    bf16 autocast, which keeps norms in float32: an upper bound. Of perceptual networks only LPIPS
    counts.
    """
    widths = shape.block_out_channels
    pixels = batch * height * width // shape.compression**2
    before = widths[-1]
    # The middle block, without a (pixels, pixels) attention matrix: fused kernels keep none.
    blocks = [3 * 4 * widths[-1] * pixels * 4]
    inputs = 0
    for level, channels in enumerate(reversed(widths)):
        inputs += before * pixels * 4
        # Norm's input, activation's input and convolution's input, twice a residual block.
        kept = (3 * before + 3 * channels) * pixels
        kept += shape.layers_per_block * 6 * channels * pixels
        if level < len(widths) - 1:
            pixels *= 4
            kept += channels * pixels
        blocks.append(4 * kept)
        before = channels
    last = 4 * widths[0] * pixels
    # The head keeps its norm's and activation's inputs and a padded map, which its four
    # convolutions share; each of them then gives a whole map of gradients.
    head, head_gradients = 7 * last // 2, 3 * last
    kept = (inputs if checkpointing else sum(blocks)) + head
    loss = lpips_bytes(batch * height * width) if perceptual == "lpips" else 0
    # With checkpointing one level's insides, the largest, are there again.
    again = inputs + max(blocks) if checkpointing else 0
    return max(kept + loss, kept + head_gradients, again)


def encoder_working_bytes(
    shape: AutoencoderShape, height: int, width: int, batch: int, item: int
) -> int:
    """Peak of encoding without gradients, weights aside: photographs, and maps of one level.

    While a residual block ends there are its input, its last map, their sum and its scaled copy,
    and what the level was given, where that is not the block's own input.

    Args:
        shape: the autoencoder.
        height: of the photographs in pixels.
        width: likewise.
        batch: photographs at once.
        item: bytes of a value.
    """
    pixels = batch * height * width // shape.stride**2
    maps, before = 0, shape.block_out_channels[0]
    for channels in shape.block_out_channels:
        given = 0 if shape.layers_per_block == 1 and before == channels else before
        maps = max(maps, (given + 4 * channels) * pixels)
        pixels //= 4
        before = channels
    return item * (shape.in_channels * batch * height * width + maps)


def decoder_working_bytes(
    shape: AutoencoderShape, height: int, width: int, batch: int, item: int
) -> int:
    """Peak of decoding without gradients, weights aside; arguments as `encoder_working_bytes`.

    As there, level by level; and between two levels the map before, after nearest upsampling and
    after its convolution.
    """
    widths = tuple(reversed(shape.block_out_channels))
    pixels = batch * height * width // shape.compression**2
    maps, before = 0, widths[0]
    for level, channels in enumerate(widths):
        # Norm and activation beside the input of the first block, then as in the encoder.
        maps = max(maps, 3 * before * pixels, (before + 4 * channels) * pixels)
        if level < len(widths) - 1:
            maps = max(maps, (before + channels) * pixels + 2 * channels * 4 * pixels)
            pixels *= 4
        before = channels
    return item * (shape.latent_channels * batch * height * width // shape.compression**2 + maps)


def text_working_bytes(shape: T5Shape, tokens: int, batch: int, item: int) -> int:
    """Peak of T5 without gradients, weights aside: four maps of either width in the gated MLP.

    And the table of relative positions, (heads, tokens, tokens), which all layers share.
    """
    rows = batch * tokens
    positions = shape.num_heads * tokens**2
    return item * (4 * rows * (shape.d_ff + shape.d_model) + positions)


def clip_working_bytes(shape: ClipShape, batch: int, item: int) -> int:
    """Peak of a CLIP text encoder without gradients: three maps of its MLP, four of its width."""
    rows = batch * shape.max_position_embeddings
    return item * rows * (3 * shape.intermediate_size + 4 * shape.hidden_size)


def flux_sampling_bytes(shape: FluxShape, tokens: int, batch: int, item: int) -> int:
    """Peak of a forward pass without gradients, weights aside: a single block rotates q or k.

    Then there are the model's stream and the block's joint one, its norm, the MLP (4 wide), q, k
    and v; of what is rotated the other half, and two products in float32 with their sum.
    """
    rows = batch * tokens
    tables = 8 * tokens * shape.attention_head_dim
    return rows * shape.width * ((7 + MLP_RATIO) * item + 12) + tables


def communication_bytes(
    parameters: int, processes: int, precision: Precision, zero_stage: int = 2
) -> int:
    """Two reduction buckets, one filling while the other travels; also where there is one process.

    ZeRO 0 and 1 reduce after the backward pass (`update_bytes`). Under ZeRO 3 also the weights that
    are gathered for the layers at work.
    """
    item = ITEM_BYTES[precision]
    buckets = 2 * min(BUCKET_ELEMENTS, parameters) if zero_stage >= 2 else 0
    # A model smaller than the limit is gathered whole; one process has all of it.
    gathered = min(GATHERED_ELEMENTS, parameters) if zero_stage == 3 and processes > 1 else 0
    return item * (buckets + gathered)


def update_bytes(
    trained: TrainedTensors,
    processes: int,
    precision: Precision,
    zero_stage: int,
    optimizer: Optimizer = "adamw",
) -> int:
    """Copies at the update, beside states and gradients, measured on DeepSpeed.

    Stages 2 and 3 flatten this rank's gradients; every stage then holds a root of the second
    moments, of as many values as there are weights (Adafactor's are as many). Muon goes matrix by
    matrix and is left out. Stages 0 and 1 reduce gradients in copies before.
    """
    elements = trained.elements
    share = elements if zero_stage == 0 else -(-elements // processes)
    roots = elements - trained.matrices if optimizer == "muon" else share
    reduced = ITEM_BYTES[precision] * min(elements, ALLREDUCE_ELEMENTS)
    # Stage 1 in float32 reduces as stage 2 does.
    plain = zero_stage == 0 or (zero_stage == 1 and precision == "bf16")
    return max(4 * roots, reduced if plain else 0)
