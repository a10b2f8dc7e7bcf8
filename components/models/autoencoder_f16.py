"""F16 autoencoder: Flux's F8 VAE with a stride-2 stem and a x2 upsampling head.

Same parameters and state-dict keys as F8, so that an F8 folder loads as it is. The stem convolution
takes stride 2 (the F8 result at even pixels); the head upsamples x2 (nearest) before `conv_out`.

Shape legend: B batch, C channels, H and W height and width of the feature map before the head.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from components.files.weight_folders import require_class

# ModelMixin is here for diffusers: to load a component of a saved pipeline, it looks its base class
# up by this name in the component's own module.
__all__ = [
    "DECODE_MODES",
    "VAE_CLASSES",
    "AutoencoderKLF16",
    "DecodeMode",
    "ModelMixin",
    "UpsampledConv2d",
    "phase_kernels",
]

DecodeMode: TypeAlias = Literal["aligned", "official_partitioned"]
DECODE_MODES: tuple[DecodeMode, ...] = ("aligned", "official_partitioned")
VAE_CLASSES = ("AutoencoderKLF16", "AutoencoderKL")
"""Named in the config.json of folders that it loads."""


def phase_kernels(weight: Tensor) -> Tensor:
    """The 2x2 kernels that a 3x3 convolution becomes on a nearest x2 upsampled map.

    An output at even position 2i reads upsampled pixels 2i-1, 2i, 2i+1, that is source pixels
    i-1, i, i: taps (w0, w1 + w2). At odd position: i, i, i+1: taps (w0 + w1, w2).

    Args:
        weight: (out, in, 3, 3).

    Returns:
        (2, 2, out, in, 2, 2), indexed by the output's row and column phase.
    """

    def fold(kernel: Tensor, dim: int) -> Tensor:
        first, middle, last = (kernel.narrow(dim, tap, 1) for tap in range(3))
        even = torch.cat((first, middle + last), dim)
        odd = torch.cat((first + middle, last), dim)
        return torch.stack((even, odd))

    # Rows and columns fold independently: nearest upsampling is separable, the kernel need not be.
    rows = fold(weight, 2)
    return torch.stack([fold(kernel, 3) for kernel in rows])


class UpsampledConv2d(nn.Conv2d):
    """Nearest x2 upsampling followed by a 3x3 convolution, computed as four phase convolutions.

    Equal to the plain form (tested to 1e-12 in float64) with 4/9 of its multiplications and
    without its largest activation. Parameters are those of the 3x3 convolution.

    Args:
        in_channels: channels of the feature map.
        out_channels: channels of the image.
        decode_mode: `aligned`, or `official_partitioned`, the released decoder's
            conv2d(pad1(up2(pad1(h))))[1:2H+1, 1:2W+1], whose image lies one pixel further down
            and to the right.
    """

    def __init__(self, in_channels: int, out_channels: int, decode_mode: DecodeMode) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        self.decode_mode = decode_mode

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, 2H, 2W)."""
        batch, _, height, width = input.shape
        if self.decode_mode == "aligned":
            padded, rows, columns = F.pad(input, (1, 1, 1, 1)), height, width
        else:
            # One more source pixel above and to the left; the shift is cut out below.
            padded, rows, columns = F.pad(input, (2, 1, 2, 1)), height + 1, width + 1
        # Folded at every call (9 numbers to 16 a filter pair, nothing beside the convolution), so
        # that training moves the 3x3 weights, whose names and shapes every Flux folder has.
        kernels = phase_kernels(self.weight)
        phases = [
            # Phase p of the outputs starts one source pixel later; both read 2x2 windows.
            F.conv2d(padded[:, :, p : p + rows + 1, q : q + columns + 1], kernels[p, q], self.bias)
            for p in (0, 1)
            for q in (0, 1)
        ]
        # pixel_shuffle wants (out, row phase, column phase) in this order on the channel axis.
        stacked = torch.stack(phases, dim=2).reshape(batch, -1, rows, columns)
        image = F.pixel_shuffle(stacked, 2)
        if self.decode_mode == "official_partitioned":
            image = image[:, :, 1 : 2 * height + 1, 1 : 2 * width + 1]
        return image


class AutoencoderKLF16(AutoencoderKL):
    """diffusers' AutoencoderKL with `stride` times its spatial compression.

    Args (beyond AutoencoderKL's, which have Flux's defaults where they differ):
        stride: 1 keeps F8, 2 makes it F16.
        decode_mode: pixel grid of the decoder, see `UpsampledConv2d`; without effect at stride 1.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        sample_size: int = 1024,
        scaling_factor: float = 0.3611,
        shift_factor: float | None = 0.1159,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        mid_block_add_attention: bool = True,
        stride: int = 2,
        decode_mode: DecodeMode = "aligned",
    ) -> None:
        # Any other number would silently leave an F8: only 2 changes layers below.
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride}")
        if decode_mode not in DECODE_MODES:
            raise ValueError(
                f"decode_mode: expected one of {', '.join(DECODE_MODES)}, got {decode_mode!r}"
            )
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        if stride == 2:
            # Stride and nothing else: with padding 1 the stem gives F8's result at even pixels.
            self.encoder.conv_in.stride = (2, 2)
            # Only the class changes; names and shapes stay, so that F8 state dicts load without
            # conversion.
            self.decoder.conv_out = UpsampledConv2d(
                block_out_channels[0], out_channels, decode_mode
            )
        # diffusers derives a tile's latents from the number of levels and misses the stride: tiles
        # would not meet (the released class raises).
        # Rounded down to a size that has whole latents in its overlap, whatever sample_size a stock
        # folder has.
        self.set_tile_size(
            max(self.tile_multiple, sample_size // self.tile_multiple * self.tile_multiple)
        )

    @property
    def spatial_compression(self) -> int:
        """Image pixels per latent pixel and axis: 8 (stride 1) or 16 for Flux's four levels."""
        levels: int = len(self.config.block_out_channels) - 1
        return int(2**levels * self.config.stride)

    @property
    def tile_multiple(self) -> int:
        """Tile sizes must be multiples of this, so that the quarter overlap is whole latents."""
        return 4 * self.spatial_compression

    def set_tile_size(self, tile_px: int) -> None:
        """Set the tile side for tiled encoding and decoding.

        Args:
            tile_px: image pixels; neighbouring tiles overlap by a quarter of it.

        Raises:
            ValueError: not a positive multiple of `tile_multiple`.
        """
        if tile_px < self.tile_multiple or tile_px % self.tile_multiple:
            raise ValueError(
                f"tile_px: expected a positive multiple of {self.tile_multiple}, got {tile_px}"
            )
        # Both sizes together: diffusers cuts images by the first, latents by the second, and blends
        # over the overlap that follows from each.
        self.tile_sample_min_size = tile_px
        self.tile_latent_min_size = tile_px // self.spatial_compression
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> AutoencoderKLF16:
        """Load an F8 (`AutoencoderKL`) or F16 folder; keyword arguments are diffusers' own.

        An F8 folder becomes F16 unless `stride=1` is passed.

        Raises:
            WeightsMissing: no config.json there.
            ValueError: the folder holds another class.
        """
        require_class(
            pretrained_model_name_or_path,
            kwargs.get("subfolder"),
            VAE_CLASSES,
        )
        # The configuration of an F8 folder has no stride, so the constructor's default makes it
        # F16.
        model: AutoencoderKLF16 = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        # diffusers records the folder in the configuration; saved bytes must not depend on it.
        model.register_to_config(_name_or_path="")
        return model

    def _encode(self, x: Tensor) -> Tensor:
        # Strided convolutions would round such a size, and the decoder return another one.
        height, width = x.shape[-2:]
        if height % self.spatial_compression or width % self.spatial_compression:
            raise ValueError(
                f"image: height and width must be multiples of {self.spatial_compression}, "
                f"got {height}x{width}"
            )
        moments: Tensor = super()._encode(x)
        return moments
