"""MUSIQ (Ke et al. 2021): quality from native pixels and two smaller scales, at any image size.

The image and two copies with longer edges of 384 and 224 px are cut into 32 px patches; a small
convolutional stem turns each into a token, a transformer over all tokens reads the quality off its
class token. At 4096 x 4096 that is 16,384 native tokens, whose attention matrices would take 6 GiB
per layer: scaled_dot_product_attention never forms them, and the stem runs over patches in blocks.
Both are the same numbers up to float32 rounding (tested against pyiqa's own attention).

Written from the paper and the public checkpoint's parameter names, so that the Apache-2.0 weights
run without pyiqa (PolyForm-Noncommercial). Padding tokens, which the original masks, are left out.

Legend: B batch, L tokens, D width, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.images.arrays import ImageArray

if TYPE_CHECKING:
    from components.metrics.metric import Picture


PATCH_PX = 32
LONGER_EDGES_PX = (224, 384)
POSITION_GRID = 10
STEM_WIDTH = 64
STEM_PATCHES = 512
"""Patches of one pass through the stem: bounds its activations at about 100 MiB."""


def _same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME: the surplus zero stands at the bottom and right."""
    total = [
        max((math.ceil(edge / stride) - 1) * stride + kernel - edge, 0) for edge in x.shape[-2:]
    ]
    (rows, columns) = total
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class _StandardisedConvolution(nn.Conv2d):
    """Weights with mean 0 and deviation 1 per output channel; TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        # At each call, not folded in at loading: the checkpoint's parameters stay as they are.
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        # torch's deviation, with n - 1; the other one changes every score.
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        kernel, stride = int(self.kernel_size[0]), int(self.stride[0])
        return F.conv2d(_same_padding(x, kernel, stride), weight, None, stride)


class _Bottleneck(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = _StandardisedConvolution(width, width, 1, bias=False)
        self.gn1 = nn.GroupNorm(32, width, eps=1e-4)
        self.conv2 = _StandardisedConvolution(width, width, 3, bias=False)
        self.gn2 = nn.GroupNorm(32, width, eps=1e-4)
        self.conv3 = _StandardisedConvolution(width, out, 1, bias=False)
        self.gn3 = nn.GroupNorm(32, out, eps=1e-4)
        self.conv_proj = _StandardisedConvolution(width, out, 1, bias=False)
        self.gn_proj = nn.GroupNorm(32, out, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.gn_proj(self.conv_proj(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(self.gn3(self.conv3(x)) + shortcut)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            projection(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        # No mask: without padding tokens every token is a piece of the picture.
        attended = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return mixed


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.mlp = _Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Table(nn.Module):
    """One learnt table under the name that the checkpoint has for it."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        # Under a dynamic name, so that the public state dict loads without a map.
        self.register_parameter(name, nn.Parameter(0.02 * torch.randn(*shape)))


class _Encoder(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        # One table of 10 x 10 cells for grids of any size: positions are hashed onto it.
        self.posembed_input = _Table("position_emb", 1, POSITION_GRID**2, width)
        self.scaleembed_input = _Table("scale_emb", len(LONGER_EDGES_PX) + 1, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.transformer = nn.ModuleDict(
            {f"encoderblock_{i}": _Block(width, hidden, heads) for i in range(layers)}
        )

    def forward(self, tokens_BLD: Tensor, positions_L: Tensor, scales_L: Tensor) -> Tensor:
        places = self.posembed_input.get_parameter("position_emb")[0, positions_L]
        levels = self.scaleembed_input.get_parameter("scale_emb")[scales_L]
        # The class token stands first, without place or scale; the head reads position 0.
        x = torch.cat([self.cls, tokens_BLD + places + levels], dim=1)
        for block in self.transformer.values():
            x = block(x)
        normalised: Tensor = self.encoder_norm(x)
        return normalised


def _hashed_positions(rows: int, columns: int) -> Tensor:
    """Cell of a 10 x 10 grid for each patch, (rows * columns,)."""
    cells = [
        # float32, as interpolation with mode "nearest" computes it.
        torch.floor(torch.arange(n, dtype=torch.float32) * torch.tensor(POSITION_GRID / n)).clamp(
            max=POSITION_GRID - 1
        )
        for n in (rows, columns)
    ]
    return (cells[0][:, None] * POSITION_GRID + cells[1][None, :]).flatten().long()


class Musiq(nn.Module):
    """The network with a single quality (KonIQ, SPAQ, PaQ-2-PiQ checkpoints).

    Args:
        width: of the tokens.
        hidden: of the transformer's perceptrons.
        heads: of its attention.
        layers: of the transformer.
    """

    def __init__(
        self, width: int = 384, hidden: int = 1152, heads: int = 6, layers: int = 14
    ) -> None:
        super().__init__()
        self.conv_root = _StandardisedConvolution(3, STEM_WIDTH, 7, 2, bias=False)
        self.gn_root = nn.GroupNorm(32, STEM_WIDTH, eps=1e-6)
        self.block1 = _Bottleneck(STEM_WIDTH, 4 * STEM_WIDTH)
        self.embedding = nn.Linear(4 * STEM_WIDTH * (PATCH_PX // 4) ** 2, width)
        self.transformer_encoder = _Encoder(width, hidden, heads, layers)
        self.head = nn.Linear(width, 1)
        self.requires_grad_(False).eval()

    def _stem(self, patches_PCHW: Tensor) -> Tensor:
        """(P, 3, 32, 32) to (P, D)."""
        x = F.relu(self.gn_root(self.conv_root(patches_PCHW)))
        x = self.block1(F.max_pool2d(_same_padding(x, 3, 2), 3, 2))
        # Channels last, the checkpoint's order.
        tokens: Tensor = self.embedding(x.permute(0, 2, 3, 1).flatten(1))
        return tokens

    def _tokens(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (P, D) and position cells (P,) of one scale."""
        padded = _same_padding(image_BCHW, PATCH_PX, PATCH_PX)
        grid = padded[0].unfold(1, PATCH_PX, PATCH_PX).unfold(2, PATCH_PX, PATCH_PX)
        rows, columns = grid.shape[1:3]
        patches = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
        # A 4096 px picture has 32 such blocks; normalisation is per patch, so blocks change
        # nothing.
        tokens = torch.cat([self._stem(part) for part in patches.split(STEM_PATCHES)])
        return tokens, _hashed_positions(rows, columns).to(tokens.device)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Quality of one image.

        Args:
            image_BCHW: (1, 3, H, W) float32 in [0, 1].

        Returns:
            (), about 0 to 100 with the published weights.
        """
        # To [-1, 1] before resizing and padding: a padded zero is then mid-gray, as trained.
        image = (image_BCHW - 0.5) * 2.0
        height, width = image.shape[-2:]
        scales = []
        for edge in LONGER_EDGES_PX:
            ratio = edge / max(height, width)
            # At least one pixel, also of a picture that is all edge.
            size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
            # Without antialiasing: the weights' scores are published with this resize.
            scales.append(F.interpolate(image, size, mode="bicubic", align_corners=False))
        parts = [self._tokens(scale) for scale in (*scales, image)]
        lengths = torch.tensor([len(tokens) for tokens, _ in parts], device=image.device)
        # Row k of the scale table was learnt for part k: small to native, never reordered.
        scale_ids = torch.arange(len(parts), device=image.device).repeat_interleave(lengths)
        encoded = self.transformer_encoder(
            torch.cat([tokens for tokens, _ in parts])[None],
            torch.cat([positions for _, positions in parts]),
            scale_ids,
        )
        quality: Tensor = self.head(encoded[:, 0])[0, 0]
        return quality


class MusiqMetric:
    """`metrics.ImageMetric` over the KonIQ checkpoint."""

    def __init__(self, state: Mapping[str, Tensor], digest: str, device: str) -> None:
        """Load.

        Args:
            state: the checkpoint's parameters.
            digest: of the file.
            device: where the network runs.

        Raises:
            RuntimeError: the parameters are those of another network.
        """
        self.ids = ("musiq",)
        self.weights_digest = digest
        self._device = device
        self._network = Musiq()
        # Strict: a checkpoint with another head must not be half loaded.
        self._network.load_state_dict(dict(state))
        self._network.to(device)

    @torch.inference_mode()
    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the picture beyond its pixels is not used."""
        # A copy: decoders may hand out read-only arrays, which torch does not support.
        pixels = torch.from_numpy(np.array(rgb, copy=True)).to(self._device)
        image = pixels.permute(2, 0, 1)[None].float() / 255.0
        return {"musiq": float(self._network(image))}
