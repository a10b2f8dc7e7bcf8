"""GPU memory of training, before anyone pays for it.

Exact: weights, gradients, optimizer states and the weight average (bytes per parameter, measured
on the engine itself), and what autograd keeps of a transformer block (closed form, equal to a
count on the meta device). Estimates: working memory, communication buffers, and the tensors kept
outside of the blocks. Not included: CUDA's own context (about half a gigabyte to one) and what
the allocator loses to fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from components.planning.model_shapes import MLP_RATIO, AutoencoderShape, FluxShape
from components.settings.training import Checkpointing
from components.training.sharded.engine import BUCKET_ELEMENTS

Precision = Literal["bf16", "fp32"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "fp32": 4}
GIB = 2**30
# DeepSpeed's stage3_max_live_parameters: weights that ZeRO-3 keeps gathered at most.
GATHERED_ELEMENTS = 1_000_000_000
# State words of the attention's random numbers, kept whether or not there is dropout.
_WORDS = 24


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and the float32 masters of bf16 weights."""
    average: int
    """The exponential moving average: this rank's share of it, 0 where it is in host memory."""
    activations: int
    """Estimate (what blocks keep is exact)."""
    buffers: int
    """Estimate: communication."""

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.average + self.activations + self.buffers


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


def state_bytes(
    parameters: int,
    processes: int,
    zero_stage: int,
    precision: Precision,
    *,
    trained: int | None = None,
    eight_bits: bool = False,
) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) bytes on each GPU under DeepSpeed ZeRO with AdamW.

    Gradients are accumulated in float32. ZeRO-1 with bf16 keeps its float32 gradients whole, and
    beside them the bf16 ones of a micro batch; ZeRO-2 keeps its share of the float32 ones.

    Args:
        parameters: of the network.
        processes: ranks that share what is sharded.
        zero_stage: 0 shares nothing, 1 the optimizer, 2 gradients too, 3 weights too.
        precision: of weights.
        trained: so many of the parameters have gradients and optimizer states; None: all.
        eight_bits: whether the moments are kept in 8 bits.
    """
    low = precision == "bf16"
    trained = parameters if trained is None else trained
    sharded_from = {"optimizer": 1, "gradients": 2, "weights": 3}

    def count(what: str, whole: int) -> int:
        # Rounded up: DeepSpeed pads the flat vector so that every rank has an equal share.
        return -(-whole // processes) if zero_stage >= sharded_from[what] else whole

    weights = ITEM_BYTES[precision] * count("weights", parameters)
    gradients = 4 * count("gradients", trained)
    if low and zero_stage < 2:
        gradients += 2 * trained
    # Of the share and not the whole: scales are per block of a rank's flat tensor.
    moments = moment_bytes(count("optimizer", trained), eight_bits=eight_bits)
    # In float32 the weights are their own masters, but ZeRO keeps a flat copy of its share.
    masters = 4 * count("optimizer", trained) if low or zero_stage else 0
    return weights, gradients, moments + masters


def flux_block_bytes(
    shape: FluxShape, tokens: int, batch: int, precision: Precision
) -> tuple[int, int]:
    """What autograd keeps of one (double, single) block with fused attention, exactly.

    Double: 13 tensors of width D per token (inputs of the projections and products, q, k, v, the
    attention's output, and its copy in two streams, which a batch of one does without: there the
    streams are views of the joint tensor), the MLP's input and output of its activation (8 D),
    and in float32 four of width D for the rotation of q and k, four norm statistics, and per
    head two RMS statistics and the log-sum-exp. Single: 8 D, 9 D (MLP and joint input of the
    last projection). Then a few vectors per sample.

    Args:
        shape: the transformer.
        tokens: image and text tokens.
        batch: samples.
        precision: of the network.
    """
    item, d, rows = ITEM_BYTES[precision], shape.width, batch * tokens
    rotation = 16 * rows * d
    per_head = 12 * rows * shape.num_attention_heads
    copies = 13 if batch > 1 else 12
    double = (copies + 2 * MLP_RATIO) * item * rows * d + rotation + 16 * rows + per_head
    single = (8 + 2 * MLP_RATIO + 1) * item * rows * d + rotation + 8 * rows + per_head
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
    shape: FluxShape, tokens: int, batch: int, precision: Precision, *, checkpointing: Checkpointing
) -> int:
    """Peak of activations in the backward pass: blocks, and the working memory of one (estimate).

    With checkpointing every block keeps its input, and one block at a time is repeated;
    `selective` keeps `flux_product_bytes` too.
    """
    item, stream = ITEM_BYTES[precision], batch * tokens * shape.width
    double, single = flux_block_bytes(shape, tokens, batch, precision)
    # Gradients in flight: of the MLP's hidden layer and of the stream.
    working = (MLP_RATIO + 2) * item * stream
    # Rotary tables, float32 cos and sin.
    tables = 8 * tokens * shape.attention_head_dim
    if checkpointing != "none":
        # Every block's input; 12B at 16,896 tokens: about 10 GB in all, where keeping everything
        # takes over 150 GB (tested).
        kept = (shape.num_layers + shape.num_single_layers) * item * stream
        if checkpointing == "selective":
            double_kept, single_kept = flux_product_bytes(shape, tokens, batch, precision)
            kept += shape.num_layers * double_kept + shape.num_single_layers * single_kept
        # One block at a time is whole again, so the larger kind decides.
        return kept + max(double, single) + working + tables
    return shape.num_layers * double + shape.num_single_layers * single + working + tables


def decoder_activation_bytes(
    shape: AutoencoderShape, height: int, width: int, batch: int, *, checkpointing: bool
) -> int:
    """Estimate for the decoder in training: inputs of norms, activations and convolutions.

    Counted in float32, also under bf16 autocast, which keeps norms in float32: an upper bound.
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
    # With checkpointing the inputs of all levels and one level's insides, the largest.
    return inputs + max(blocks) if checkpointing else sum(blocks)


def communication_bytes(
    parameters: int, processes: int, precision: Precision, zero_stage: int = 2
) -> int:
    """Estimate: two reduction buckets (one filling while the other travels).

    Under ZeRO-3 also the weights that are gathered for the layers at work.
    """
    # Nothing travels between GPUs.
    if processes == 1:
        return 0
    item = ITEM_BYTES[precision]
    # A model smaller than the limit is gathered whole.
    gathered = min(GATHERED_ELEMENTS, parameters) if zero_stage == 3 else 0
    return item * (2 * min(BUCKET_ELEMENTS, parameters) + gathered)
