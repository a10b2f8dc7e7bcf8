"""Floating-point operations of the networks in closed form.

A network is a list of `Product`s: matrix products and convolutions, 2 operations per
multiply-add; biases, norms, activations and softmax are not counted. This is the convention of
torch's `FlopCounterMode`, and the totals equal its counts on the meta device to the last digit
(tests/components/planning/test_flops.py).

Attention is q k^T and p v, and four products backward ("model FLOPs", what MFU is defined on).
Fused kernels do not keep p and multiply q k^T once more in the backward pass: `fused_attention`
counts that fifth product, as `FlopCounterMode` does where a fused kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from components.planning.model_shapes import (
    CLIP_TOKENS,
    MLP_RATIO,
    TIME_CHANNELS,
    AutoencoderShape,
    ClipShape,
    FluxShape,
    T5Shape,
)


@dataclass(frozen=True)
class Product:
    """One kind of matrix product or convolution."""

    flops: int
    """Forward, over the whole batch."""
    backward: float = 2.0
    """Backward operations over forward ones: 2 (gradients of both factors), 1 where the input
    needs no gradient, 2.5 for fused attention."""
    recomputed: bool = False
    """Whether activation checkpointing repeats it in the backward pass."""
    parameters: int = 0


@dataclass(frozen=True)
class Flops:
    """Operations of a pass; add and multiply them."""

    forward: int
    backward: int = 0
    recompute: int = 0
    """Forward operations that activation checkpointing repeats."""

    @property
    def model(self) -> int:
        """Forward + backward, what MFU counts."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """With recomputation: what the hardware does."""
        return self.forward + self.backward + self.recompute

    def __add__(self, other: Flops) -> Flops:
        """Sum by pass."""
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
        )

    def __mul__(self, times: int) -> Flops:
        """The same pass `times` times."""
        return Flops(self.forward * times, self.backward * times, self.recompute * times)

    @property
    def inference(self) -> Flops:
        """The forward pass alone."""
        return Flops(self.forward)


def total(products: Iterable[Product], *, checkpointing: bool = False) -> Flops:
    """Sum of products as a training pass; `.inference` of it is the forward pass."""
    # Whole numbers throughout: totals are compared with torch's counts for equality, not closeness.
    forward = backward = recompute = 0
    for product in products:
        forward += product.flops
        backward += int(product.flops * product.backward)
        # Kept apart from `forward`: MFU is defined without it, the hardware's time is not.
        recompute += product.flops if checkpointing and product.recomputed else 0
    return Flops(forward, backward, recompute)


def flux_products(
    shape: FluxShape,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    *,
    fused_attention: bool = False,
) -> list[Product]:
    """Products of one pass of a Flux transformer.

    Args:
        shape: the transformer.
        image_tokens: N, height/32 * width/32 for an F16 autoencoder.
        text_tokens: L; Flux attends to all of them, padding included.
        batch: B.
        fused_attention: see the module docstring.
    """
    # Widths of text and image stream are equal in Flux, so both streams' rows are counted as one.
    d, b = shape.width, batch
    tokens = image_tokens + text_tokens

    def block(rows: int, inputs: int, outputs: int) -> Product:
        return Product(2 * rows * inputs * outputs, recomputed=True)

    # q k^T and p v over all heads: 2 * 2 * T^2 * width.
    # At 16,384 + 512 tokens of the 12B shape this is 48% of the forward pass: it grows with the
    # square.
    attention = Product(
        4 * b * tokens**2 * d, backward=2.5 if fused_attention else 2.0, recomputed=True
    )
    double = [
        block(b, d, 2 * 6 * d),  # modulation of both streams, one row per sample
        block(b * tokens, d, 4 * d),  # q, k, v, out
        attention,
        block(b * tokens, d, 2 * MLP_RATIO * d),  # MLP, up and down
    ]
    single = [
        block(b, d, 3 * d),  # modulation
        block(b * tokens, d, 3 * d),  # q, k, v
        attention,
        block(b * tokens, d, MLP_RATIO * d),  # MLP, up
        block(b * tokens, (1 + MLP_RATIO) * d, d),  # attention and MLP, down
    ]
    # Embedders read data: the gradient of their input is not computed.
    embedders = [
        Product(2 * b * image_tokens * shape.in_channels * d, backward=1.0),
        Product(2 * b * text_tokens * shape.joint_attention_dim * d, backward=1.0),
    ]
    # The first layer of each reads data, the second reads the first one's output.
    for channels in [TIME_CHANNELS] * (1 + shape.guidance_embeds) + [shape.pooled_projection_dim]:
        embedders += [Product(2 * b * channels * d, backward=1.0), Product(2 * b * d * d)]
    # Outside of the blocks, so checkpointing does not repeat it. Text tokens are dropped before it.
    head = [
        Product(2 * b * d * 2 * d),  # last modulation
        Product(2 * b * image_tokens * d * (shape.out_channels or shape.in_channels)),
    ]
    return [
        *embedders,
        *(double * shape.num_layers),
        *(single * shape.num_single_layers),
        *head,
    ]


def flux_flops(
    shape: FluxShape,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    *,
    checkpointing: bool = False,
    fused_attention: bool = False,
) -> Flops:
    """Operations of one training pass of a Flux transformer; arguments as `flux_products`."""
    products = flux_products(
        shape, image_tokens, text_tokens, batch, fused_attention=fused_attention
    )
    return total(products, checkpointing=checkpointing)


def _convolution(
    inputs: int, outputs: int, pixels: int, kernel: int = 3, *, recomputed: bool = True
) -> Product:
    """A convolution with bias; `pixels` of the output, over the batch."""
    taps = inputs * outputs * kernel**2
    return Product(2 * taps * pixels, recomputed=recomputed, parameters=taps + outputs)


def _norm(channels: int) -> Product:
    """A group norm: parameters, and operations that are not counted."""
    return Product(0, parameters=2 * channels)


def _resnet(inputs: int, outputs: int, pixels: int) -> list[Product]:
    """norm, 3x3, norm, 3x3, and a 1x1 shortcut where the width changes."""
    # The convolution that ends the block stands last, where `_without_last` looks for it.
    shortcut = [_convolution(inputs, outputs, pixels, 1)] if inputs != outputs else []
    first, second = _convolution(inputs, outputs, pixels), _convolution(outputs, outputs, pixels)
    return [_norm(inputs), first, _norm(outputs), *shortcut, second]


def _without_last(block: list[Product]) -> list[Product]:
    """A checkpointed block whose last convolution is not repeated.

    torch stops repeating a block when the last tensor that its backward pass needs is there
    again, and nothing in it needs the output of that convolution.
    """
    last = block[-1]
    return [*block[:-1], Product(last.flops, last.backward, False, last.parameters)]


def _middle(shape: AutoencoderShape, pixels: int, batch: int) -> list[Product]:
    """Two residual blocks around single-head attention over all latent pixels."""
    width = shape.block_out_channels[-1]
    attention: list[Product] = []
    if shape.mid_block_add_attention:
        attention = [
            _norm(width),
            # Linear layers there, with the operations and parameters of a 1x1 convolution.
            *[_convolution(width, width, pixels * batch, 1)] * 4,  # q, k, v, out
            # Quadratic in pixels, so pixels are those of one image and the batch a factor.
            Product(4 * batch * pixels**2 * width, recomputed=True),
        ]
    resnet = _resnet(width, width, pixels * batch)
    return _without_last([*resnet, *attention, *resnet])


def encoder_products(
    shape: AutoencoderShape, height: int, width: int, batch: int = 1
) -> list[Product]:
    """Products of encoding (B, 3, height, width); edges are multiples of the compression."""
    widths, last = shape.block_out_channels, shape.block_out_channels[-1]
    # The strided stem makes the first level smaller; from there on the network is the F8 one.
    pixels = height * width // shape.stride**2
    products = [_convolution(shape.in_channels, widths[0], batch * pixels, recomputed=False)]
    before = widths[0]
    for level, channels in enumerate(widths):
        for number in range(shape.layers_per_block):
            products += _resnet(channels if number else before, channels, batch * pixels)
        if level < len(widths) - 1:
            pixels //= 4
            products.append(_convolution(channels, channels, batch * pixels))
        before = channels
    # Mean and log-variance.
    moments = 2 * shape.latent_channels
    products += [*_middle(shape, pixels, batch), _norm(last)]
    products.append(_convolution(last, moments, batch * pixels, recomputed=False))
    if shape.use_quant_conv:
        products.append(_convolution(moments, moments, batch * pixels, 1, recomputed=False))
    return products


def decoder_products(
    shape: AutoencoderShape, height: int, width: int, batch: int = 1
) -> list[Product]:
    """Products of decoding to (B, 3, height, width); latents take no gradient."""
    widths, last = shape.block_out_channels, shape.block_out_channels[-1]
    latent = shape.latent_channels
    pixels = height * width // shape.compression**2
    products: list[Product] = []
    if shape.use_post_quant_conv:
        products.append(_convolution(latent, latent, batch * pixels, 1, recomputed=False))
    products.append(_convolution(latent, last, batch * pixels, recomputed=False))
    # Nothing before the first product wants a gradient.
    first = products[0]
    products[0] = Product(first.flops, 1.0, False, first.parameters)
    products += _middle(shape, pixels, batch)
    before = last
    for level, channels in enumerate(reversed(widths)):
        block: list[Product] = []
        # A decoder level has one residual block more than an encoder level (diffusers' layout).
        for number in range(shape.layers_per_block + 1):
            block += _resnet(channels if number else before, channels, batch * pixels)
        if level < len(widths) - 1:
            pixels *= 4
            # After the upsampling, hence at the larger size.
            block.append(_convolution(channels, channels, batch * pixels))
        # A level is one checkpoint: only its last convolution need not be repeated.
        products += _without_last(block)
        before = channels
    return [*products, _norm(widths[0]), _image_head(shape, height, width, batch)]


def _image_head(shape: AutoencoderShape, height: int, width: int, batch: int) -> Product:
    """conv_out; for F16 four 2x2 phase convolutions before the x2 upsampling."""
    inputs, outputs = shape.block_out_channels[0], shape.out_channels
    plain = _convolution(inputs, outputs, batch * height * width, recomputed=False)
    if shape.stride == 1:
        return plain
    # Its shift by one pixel is cut from a map one source pixel larger each way.
    more = shape.decode_mode == "official_partitioned"
    positions = (height // 2 + more) * (width // 2 + more)
    # 4 phases of 4 taps each; the parameters stay those of the 3x3 kernel.
    flops = 4 * 2 * (inputs * outputs * 4) * positions * batch
    return Product(flops, parameters=plain.parameters)


def parameters(products: Iterable[Product]) -> int:
    """Parameters of an encoder or a decoder."""
    return sum(product.parameters for product in products)


def t5_flops(shape: T5Shape, tokens: int, batch: int = 1) -> Flops:
    """Forward operations of a gated T5 encoder on (B, tokens)."""
    inner = shape.num_heads * shape.d_kv
    # q, k, v, out, and three matrices of the gated MLP; T5's heads need not add up to its width.
    weights = shape.d_model * (4 * inner + 3 * shape.d_ff)
    layer = 2 * batch * tokens * weights + 4 * batch * tokens**2 * inner
    return Flops(shape.num_layers * layer)


def clip_flops(shape: ClipShape, batch: int = 1, tokens: int = CLIP_TOKENS) -> Flops:
    """Forward operations of a CLIP text encoder on (B, tokens)."""
    d = shape.hidden_size
    weights = 4 * d * d + 2 * d * shape.intermediate_size
    layer = 2 * batch * tokens * weights + 4 * batch * tokens**2 * d
    # The projection acts on one pooled state per sample.
    return Flops(shape.num_hidden_layers * layer + 2 * batch * d * (shape.projection_dim or 0))


def mean_flops(passes: Iterable[Flops]) -> Flops:
    """Mean of passes, each as often as the others (at least one), in whole operations."""
    items = list(passes)
    summed = sum(items, start=Flops(0))
    # Floored: a fraction of an operation means nothing.
    count = len(items)
    return Flops(summed.forward // count, summed.backward // count, summed.recompute // count)
