"""Tiny deterministic models in the true architectures, for machines without the real weights.

The transformer is random. The autoencoder's encoder is not: only the decoder is post-trained, so
what the encoder drops is lost. Its weights are set so that the network, attention, group norms and
all, computes an almost exactly linear map from each patch to its lowest polynomial moments.

- A stride-2 convolution can combine the moments of four child blocks into those of their parent
  (the binomial theorem), so the stem and the downsamplers climb from pixels to 16x16 blocks.
- Residual branches end in zeros, so blocks pass their input through.
- The last group norm sees each signal as (x, -x) beside a constant pair (K, -K): the group's mean
  is zero and its spread is K, so it only divides by K. And silu(a) - silu(-a) = a, so the last
  convolution recovers x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from components.models.resonance_rope import RopeVariant

if TYPE_CHECKING:
    # Imported where they are built: each brings seconds of diffusers that the other does not need.
    from components.models.autoencoder_f16 import AutoencoderKLF16, DecodeMode
    from components.models.transformer import UltraFluxTransformer2DModel

# Orthonormal opponent colours: luma, red-blue, green-magenta.
OPPONENT_COLOURS = torch.tensor(
    [
        [1 / math.sqrt(3)] * 3,
        [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)],
        [-1 / math.sqrt(6), 2 / math.sqrt(6), -1 / math.sqrt(6)],
    ],
    dtype=torch.float64,
)
# (colour, row degree, column degree) in order of falling energy in natural images. Every moment
# comes after those that its children need (same colour, lower degrees).
MOMENTS: tuple[tuple[int, int, int], ...] = (
    *((0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 0), (0, 1, 1), (0, 0, 2)),
    *((1, 1, 0), (1, 0, 1), (2, 1, 0), (2, 0, 1), (0, 3, 0), (0, 2, 1), (0, 1, 2), (0, 0, 3)),
)
# K of the constant pair. Signals are of order 1, so they change a group's spread by about 1e-4.
CONSTANT = 64.0
LOG_VARIANCE = -20.0
CALIBRATION_IMAGES = 8
# 32 x 32 latents at most: the middle block attends over all of them.
CALIBRATION_LATENTS, CALIBRATION_PX = 32, 256


def synthetic_images(count: int, size_px: int, seed: int) -> Tensor:
    """Seeded colour noise with the 1/f amplitude spectrum of natural images.

    Args:
        count: number of images.
        size_px: side.
        seed: of NumPy's PCG64 generator.

    Returns:
        (count, 3, size_px, size_px) float32, luma spread about 0.5, clipped to [-1, 1].
    """
    # NumPy names its generator: the calibration must not change with torch's default one.
    rng = np.random.Generator(np.random.PCG64(seed))
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :]
    radius = np.hypot(fy, fx)
    # The mean has no frequency; it gets the amplitude of the lowest one instead of infinity.
    radius[0, 0] = 1.0 / size_px
    noise = rng.standard_normal((count, 3, size_px, size_px))
    fields = np.fft.irfft2(np.fft.rfft2(noise) / radius, s=(size_px, size_px))
    # Each field alone has spread 1, so the colour spreads below are exact for every image.
    fields /= fields.std(axis=(2, 3), keepdims=True)
    # Luma spread 0.5 a channel; chroma a third of it, as in photographs.
    spread = 0.5 * math.sqrt(3) * np.array([1.0, 0.35, 0.25])[:, None, None]
    opponent = torch.from_numpy(fields * spread)
    images = torch.einsum("kc,bkhw->bchw", OPPONENT_COLOURS, opponent)
    return images.clamp(-1.0, 1.0).float()


def _parent_weight(parent: tuple[int, int, int], child: tuple[int, int, int]) -> Tensor:
    """(2, 2) weights of a child moment, by child row and column, in its parent's moment.

    With coordinates in [-1, 1], a child's u is the parent's U = (u + s) / 2, s = -1 or 1.
    """
    # Colours do not mix: they were made orthonormal in the stem.
    if parent[0] != child[0]:
        return torch.zeros(2, 2, dtype=torch.float64)

    def axis(power: int, k: int) -> Tensor:
        if k > power:
            # A child's higher power never enters a lower one of its parent.
            return torch.zeros(2, dtype=torch.float64)
        shifts = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        return shifts.pow(power - k) * (math.comb(power, k) / 2**power)

    # (u + s)^p expands into children's powers; 1/4 makes a parent the mean over four children.
    return torch.outer(axis(parent[1], child[1]), axis(parent[2], child[2])) / 4


def _pooling_kernel(moments: Sequence[tuple[int, int, int]]) -> Tensor:
    """(n, n, 2, 2) map from four children's moments to their parent's."""
    return torch.stack(
        [torch.stack([_parent_weight(parent, child) for child in moments]) for parent in moments]
    )


def _zero(module: Any) -> None:
    """Set a convolution or linear layer to the zero map."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _pass_through(resnet: Any) -> None:
    """Make a residual block the identity on the channels that it keeps."""
    # conv2 ends the branch: with it at zero, whatever norms and conv1 do is multiplied by zero.
    _zero(resnet.conv2)
    shortcut = resnet.conv_shortcut
    if shortcut is not None:
        _zero(shortcut)
        with torch.no_grad():
            channels = min(shortcut.weight.shape[:2])
            shortcut.weight[range(channels), range(channels), 0, 0] = 1.0


def _moments_that_fit(vae: AutoencoderKLF16) -> tuple[tuple[int, int, int], ...]:
    """Leading moments that are independent on a patch and for which the widths leave room."""
    config = vae.config
    widths, groups = config.block_out_channels, config.norm_num_groups
    # A group spends two channels on (K, -K); each further pair of channels carries one signal.
    pairs = groups * ((widths[-1] // groups - 2) // 2)
    room = max(0, min(config.latent_channels, *widths[:-1], pairs))
    # On n pixels, powers from n on are combinations of the lower ones.
    patch = vae.spatial_compression
    independent = [moment for moment in MOMENTS if max(moment[1:]) < patch]
    # A prefix: what a moment needs of its children stands before it in MOMENTS.
    return tuple(independent[:room])


@torch.no_grad()
def _make_encoder_linear(vae: AutoencoderKLF16, moments: Sequence[tuple[int, int, int]]) -> None:
    """Set the encoder to the polynomial moments of each patch (see the module docstring)."""
    encoder = vae.encoder
    signals = len(moments)
    pooling = _pooling_kernel(moments)

    _zero(encoder.conv_in)
    stride = vae.config.stride
    for index, (colour, row, column) in enumerate(moments):
        if stride == 1:
            # A pixel has no extent: its only moment is its value.
            if (row, column) == (0, 0):
                encoder.conv_in.weight[index, :, 1, 1] = OPPONENT_COLOURS[colour].float()
            continue
        # Padding 1 at stride 2: kernel entries 1 and 2 lie on pixels 2i and 2i + 1.
        # Of a child's constant moment alone: a pixel has no higher ones.
        corner = _parent_weight((colour, row, column), (colour, 0, 0))
        block = torch.einsum("c,hw->chw", OPPONENT_COLOURS[colour], corner)
        encoder.conv_in.weight[index, :, 1:, 1:] = block.float()

    downsamplers = [
        block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers
    ]
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            _pass_through(resnet)
    for conv in downsamplers:
        # diffusers pads these at the bottom and right: entries 0 and 1 lie on the 2x2 block.
        _zero(conv)
        conv.weight[:signals, :signals, :2, :2] = pooling.float()
    _arrange_pairs(vae, signals)
    for resnet in encoder.mid_block.resnets:
        _pass_through(resnet)
    for attention in encoder.mid_block.attentions:
        if attention is not None:
            _zero(attention.to_out[0])


def _pair_slots(channels: int, groups: int, signals: int) -> tuple[list[int], list[int]]:
    """Channel of each signal's x (its -x is next), and of each group's K (its -K is next)."""
    size = channels // groups
    # Signals go to the groups in turn, so that none holds all the strong ones.
    slots = [group * size + 2 * pair for pair in range((size - 2) // 2) for group in range(groups)]
    return slots[:signals], [group * size + size - 2 for group in range(groups)]


def _arrange_pairs(vae: AutoencoderKLF16, signals: int) -> None:
    """Lay signals out as (x, -x) beside (K, -K) in every group of the last norm."""
    encoder = vae.encoder
    channels, groups = encoder.conv_norm_out.num_channels, encoder.conv_norm_out.num_groups
    slots, constants = _pair_slots(channels, groups, signals)
    # The first residual block of the last level is the last place that can move channels: through
    # its shortcut where it changes their number, else through its otherwise idle branch.
    first = encoder.down_blocks[-1].resnets[0]
    if first.conv_shortcut is not None:
        mixing: Any = first.conv_shortcut
        _zero(mixing)
        mixing.weight[slots, range(signals), 0, 0] = 1.0
        mixing.weight[[slot + 1 for slot in slots], range(signals), 0, 0] = -1.0
    else:
        mixing = encoder.down_blocks[-2].downsamplers[0].conv
        kernel = mixing.weight[:signals].clone()
        _zero(mixing)
        mixing.weight[slots] = kernel
        mixing.weight[[slot + 1 for slot in slots]] = -kernel
    mixing.bias[constants] = CONSTANT
    mixing.bias[[constant + 1 for constant in constants]] = -CONSTANT
    # Undo the division by the group's spread K sqrt(2 / size).
    nn.init.constant_(encoder.conv_norm_out.weight, CONSTANT * math.sqrt(2 * groups / channels))
    nn.init.zeros_(encoder.conv_norm_out.bias)
    _set_readout(vae, torch.eye(vae.config.latent_channels, signals, dtype=torch.float64), None)


def _set_readout(vae: AutoencoderKLF16, matrix: Tensor, offset: Tensor | None) -> None:
    """Latent means = matrix @ signals + offset, log-variances constant."""
    encoder = vae.encoder
    latent_channels, signals = matrix.shape
    norm = encoder.conv_norm_out
    slots, _ = _pair_slots(norm.num_channels, norm.num_groups, signals)
    _zero(encoder.conv_out)
    # The centre tap only: latents of a patch depend on no neighbour.
    encoder.conv_out.weight[:latent_channels, slots, 1, 1] = matrix.float()
    encoder.conv_out.weight[:latent_channels, [slot + 1 for slot in slots], 1, 1] = -matrix.float()
    if offset is not None:
        encoder.conv_out.bias[:latent_channels] = offset.float()
    encoder.conv_out.bias[latent_channels:] = LOG_VARIANCE


@torch.no_grad()
def _calibrate(vae: AutoencoderKLF16, signals: int, seed: int) -> None:
    """Whiten the latents of synthetic images, then store their remaining mean and spread."""
    size_px = min(CALIBRATION_PX, CALIBRATION_LATENTS * vae.spatial_compression)
    images = synthetic_images(CALIBRATION_IMAGES, size_px, seed)
    latent_channels = vae.config.latent_channels
    if signals:
        raw = vae.encode(images).latent_dist.mode()[:, :signals]
        samples = raw.movedim(1, -1).reshape(-1, signals).double()
        centre = samples.mean(0)
        covariance = (samples - centre).T @ (samples - centre) / len(samples)
        # Cholesky whitening keeps the order of moments and, unlike eigenvectors, has no sign
        # or rotation ambiguity.
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
        # More latents than signals: repeat them, alternating in sign.
        repeats = -(-latent_channels // signals)
        matrix = torch.cat([(-1.0) ** k * whiten for k in range(repeats)])[:latent_channels]
        _set_readout(vae, matrix, -matrix @ centre)
    latents = vae.encode(images).latent_dist.mode().double()
    # Rounded, so that the last bits of another machine's sums do not change config.json; + 0.0
    # turns -0.0 into 0.0.
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 6) + 0.0,
        scaling_factor=round(float(1.0 / latents.std()), 6),
    )


def build_tiny_autoencoder(
    *,
    block_out_channels: Sequence[int] = (32, 32, 64, 64),
    layers_per_block: int = 1,
    latent_channels: int = 16,
    norm_num_groups: int = 8,
    stride: int = 2,
    decode_mode: DecodeMode = "aligned",
    sample_size: int = 256,
    seed: int = 0,
) -> AutoencoderKLF16:
    """Autoencoder with a near-linear, information-keeping encoder and a random decoder.

    Where the widths leave no room for the linear construction (fewer than 4 channels a group)
    the encoder is random too.

    Args:
        block_out_channels: widths from the image to the latent, at least two levels.
        layers_per_block: residual blocks per level.
        latent_channels: latent channels.
        norm_num_groups: groups of every group norm; must divide all widths.
        stride: 1 (F8 with four levels) or 2 (F16).
        decode_mode: pixel grid of the decoder.
        sample_size: default tile side for tiled coding.
        seed: of the weights and the calibration images.

    Returns:
        Model in evaluation mode; (latent - shift_factor) * scaling_factor of synthetic 1/f images
        has mean 0 and spread 1. The global random state is untouched.
    """
    widths = tuple(block_out_channels)
    if len(widths) < 2 or any(width % norm_num_groups for width in widths):
        raise ValueError(
            f"block_out_channels: {widths} needs two or more levels, each a multiple of "
            f"norm_num_groups {norm_num_groups}"
        )
    from components.models.autoencoder_f16 import AutoencoderKLF16

    # Forked: building a model must not move the random state of whoever builds it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLF16(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            stride=stride,
            decode_mode=decode_mode,
        )
    vae.eval()
    moments = _moments_that_fit(vae)
    if moments:
        _make_encoder_linear(vae, moments)
    _calibrate(vae, len(moments), seed)
    return vae


def build_tiny_transformer(
    *,
    num_layers: int = 2,
    num_single_layers: int = 4,
    num_attention_heads: int = 4,
    axes_dims_rope: tuple[int, int, int] = (8, 12, 12),
    joint_attention_dim: int = 64,
    pooled_projection_dim: int = 64,
    in_channels: int = 64,
    guidance_embeds: bool = True,
    rope_variant: RopeVariant = "official",
    rope_window: int = 64,
    seed: int = 0,
) -> UltraFluxTransformer2DModel:
    """Random Flux transformer whose first prediction is zero velocity.

    Args:
        num_layers: double-stream blocks.
        num_single_layers: single-stream blocks.
        num_attention_heads: heads of sum(axes_dims_rope) channels each.
        axes_dims_rope: rotary channels of (stream, height, width).
        joint_attention_dim: T5 width.
        pooled_projection_dim: CLIP width.
        in_channels: packed latent channels, 4 times the autoencoder's.
        guidance_embeds: guidance-distilled input, as in FLUX.1-dev.
        rope_variant: see `components.models.resonance_rope`.
        rope_window: training window in tokens per axis.
        seed: of the weights; the global random state is untouched.

    Returns:
        Model in evaluation mode, float32.
    """
    from components.models.transformer import UltraFluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UltraFluxTransformer2DModel(
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=sum(axes_dims_rope),
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=tuple(axes_dims_rope),
            rope_variant=rope_variant,
            rope_window=rope_window,
        )
    # adaLN-zero's output half: training starts from the mean prediction instead of noise.
    _zero(model.proj_out)
    model.eval()
    return model
