"""Resonance 2D RoPE with YaRN: rotary frequencies that close on the training window.

Per spatial axis a band with frequency w (radians per token) makes r = L w / 2 pi cycles in the
training window of L tokens. Resonance rounds r to whole cycles, so that the phase at the window's
far edge equals that at its start; YaRN then stretches each band by how well it was trained when
the image has s = L'/L > 1 times as many tokens (UltraFlux section 3.2.2, supplement section 3).

Variants:
    official: released code of 2025-12-17 and later.
    official_prefix: the code before; it snaps 1/w instead of w. Weights v1 and v1.1 predate the
        change, so it is kept.
    paper: the text's formulas (all bands snapped to at least one cycle, s capped at 2).
    flux: plain rotary frequencies.

The extents are arguments, never read from position ids: that would force a device-to-host copy
inside a compiled graph and see only a slice of the image under context parallelism.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

RopeVariant: TypeAlias = Literal["official", "official_prefix", "paper", "flux"]
ROPE_VARIANTS: tuple[RopeVariant, ...] = ("official", "official_prefix", "paper", "flux")
FloatArray: TypeAlias = npt.NDArray[np.float64]

# Cycles in the window that bound the two blends (YaRN's beta and gamma in the released code).
LINEAR_TO_NTK_CYCLES = (1.25, 0.75)
NTK_TO_PLAIN_CYCLES = (16.0, 2.0)
PAPER_MAX_SCALE = 2.0
# YaRN's attention temperature: amplitude 0.1 ln s + 1.
AMPLITUDE_SLOPE = 0.1


def plain_frequencies(dim: int, theta: float) -> FloatArray:
    """Standard rotary frequencies theta^(-2k/dim), k = 0 .. dim/2 - 1."""
    # float64 throughout: the tables are cast to float32 once, after the last product.
    exponents: FloatArray = np.arange(0, dim, 2, dtype=np.float64) / dim
    return np.asarray(1.0 / theta**exponents, dtype=np.float64)


def snap_to_window(frequencies: FloatArray, window: int, *, all_bands: bool) -> FloatArray:
    """Replace frequencies by the nearest whole number of cycles in the window.

    Bands with less than one cycle keep their frequency unless `all_bands`, which raises them to
    one cycle (the paper's max(1, floor(r + 1/2))).
    """
    # The released code rounds halves to even, the text's floor(r + 1/2) rounds them up: each
    # variant keeps its own rule.
    cycles = window * frequencies / (2 * math.pi)
    rounded = np.floor(cycles + 0.5) if all_bands else np.round(cycles)
    snapped = 2 * math.pi * np.maximum(1.0, rounded) / window
    return snapped if all_bands else np.where(cycles >= 1.0, snapped, frequencies)


def snapped_frequencies(
    dim: int, *, window: int = 64, theta: float = 10000.0, variant: RopeVariant = "official"
) -> FloatArray:
    """A variant's frequencies after snapping and before any stretching, (dim/2,) float64."""
    plain = plain_frequencies(dim, theta)
    if variant == "flux":
        return plain
    if variant == "official_prefix":
        # Snapping wavelengths rounds 1/w, as if it were a frequency: wrong, and what v1 learned.
        return 1.0 / snap_to_window(1.0 / plain, window, all_bands=False)
    return snap_to_window(plain, window, all_bands=variant == "paper")


def _trained_share(
    dim: int, theta: float, window: int, cycles_high_low: tuple[float, float]
) -> FloatArray:
    """Linear ramp over band index: 1 for bands above the higher cycle count, 0 below the lower."""
    indices = [
        dim * math.log(window / (cycles * 2 * math.pi)) / (2 * math.log(theta))
        for cycles in cycles_high_low
    ]
    # Band k makes window / (2 pi theta^(2k/dim)) cycles: solved for k, then rounded outwards, as in
    # the released code, so that the ramp contains both bounds.
    low = max(math.floor(indices[0]), 0)
    # A window of a few tokens puts both ends below band 0; the released code never meets that.
    high = float(max(min(math.ceil(indices[1]), dim - 1), low))
    if high == low:
        # A step instead of a ramp, without dividing by zero; YaRN's own constant.
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float64) - low) / (high - low)
    return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0), dtype=np.float64)


def _official_frequencies(
    dim: int, theta: float, window: int, scale: float, variant: RopeVariant
) -> FloatArray:
    """Released code: snap, blend linear and NTK scaling, then keep the fast bands unscaled."""
    # Slow bands (less than a cycle in the window) were never seen to wrap: they are interpolated,
    # w/s. Fast ones (over 16 cycles) tell neighbours apart and are left alone. NTK stands between.
    snapped = snapped_frequencies(dim, window=window, theta=theta, variant=variant)
    linear = snapped / scale
    # "The same exponents": the snapped spectrum re-based, w = theta^-e -> base^-e.
    # This base slows the slowest plain band by exactly s and leaves the fastest as it is.
    base = theta * scale ** (dim / (dim - 2))
    ntk = snapped ** (math.log(base) / math.log(theta))
    # Two ramps in sequence, as in the released code: linear to NTK, then the result to plain.
    keep_ntk = _trained_share(dim, theta, window, LINEAR_TO_NTK_CYCLES)
    scaled = linear * (1.0 - keep_ntk) + ntk * keep_ntk
    keep_plain = _trained_share(dim, theta, window, NTK_TO_PLAIN_CYCLES)
    return scaled * (1.0 - keep_plain) + snapped * keep_plain


def _paper_frequencies(dim: int, theta: float, window: int, scale: float) -> FloatArray:
    """Text's formulas: snap every band, ramp between w/s and w by its whole cycles."""
    snapped = snapped_frequencies(dim, window=window, theta=theta, variant="paper")
    # Whole numbers of at least one after snapping, so the ramp has two values: 1/2 at one cycle and
    # 1 from two on.
    cycles = window * snapped / (2 * math.pi)
    high, low = LINEAR_TO_NTK_CYCLES
    keep = np.clip((cycles - low) / (high - low), 0.0, 1.0)
    return snapped * keep + snapped / scale * (1.0 - keep)


def axis_spectrum(
    tokens: int,
    dim: int,
    *,
    window: int = 64,
    theta: float = 10000.0,
    variant: RopeVariant = "official",
) -> tuple[FloatArray, float]:
    """Rotary frequencies of one axis.

    Args:
        tokens: extent of the axis, at least 1.
        dim: rotary channels of the axis, even and at least 4.
        window: training window in tokens.
        theta: rotary base.
        variant: see the module docstring.

    Returns:
        (frequencies, amplitude): (dim/2,) float64 in radians per token, band 0 the fastest, and
        the factor of cos and sin (1.0 within the window).

    Raises:
        ValueError: an argument is out of range or the variant is unknown.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    if dim < 4 or dim % 2:
        raise ValueError(f"dim: expected an even number of at least 4, got {dim}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    if variant not in ROPE_VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(ROPE_VARIANTS)}, got {variant!r}")
    if variant == "flux":
        return plain_frequencies(dim, theta), 1.0
    if variant == "paper":
        scale = min(max(tokens / window, 1.0), PAPER_MAX_SCALE)
        return _paper_frequencies(dim, theta, window, scale), AMPLITUDE_SLOPE * math.log(scale) + 1
    if tokens <= window:
        # Within the window the released code changes nothing, snapping included: an axis switches
        # from Flux' positions to snapped ones at token 65, and on its own, whatever the other does.
        return plain_frequencies(dim, theta), 1.0
    # The amplitude multiplies cos and sin of queries and of keys, so attention logits grow by its
    # square: YaRN's temperature, which sharpens a softmax over more tokens.
    scale = tokens / window
    frequencies = _official_frequencies(dim, theta, window, scale, variant)
    return frequencies, AMPLITUDE_SLOPE * math.log(scale) + 1


def grid_ids(tokens_h: int, tokens_w: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Position ids (tokens_h * tokens_w, 3) of an image grid, row by row, float32.

    float32 because bfloat16 holds integers exactly only to 256.
    """
    ids = torch.zeros(tokens_h, tokens_w, 3, device=device)
    ids[..., 1] = torch.arange(tokens_h, device=device)[:, None]
    ids[..., 2] = torch.arange(tokens_w, device=device)[None, :]
    return ids.reshape(-1, 3)


class ResonanceRope2D(nn.Module):
    """Rotary tables for text tokens followed by a (tokens_h, tokens_w) image grid.

    Args:
        axes_dims: rotary channels of (stream axis, height, width), (16, 56, 56) in Flux.
        theta: rotary base.
        window: training window in tokens, the same for both spatial axes.
        variant: see the module docstring.
    """

    def __init__(
        self,
        axes_dims: tuple[int, int, int] = (16, 56, 56),
        theta: float = 10000.0,
        window: int = 64,
        variant: RopeVariant = "official",
    ) -> None:
        super().__init__()
        self.axes_dims = (axes_dims[0], axes_dims[1], axes_dims[2])
        self.theta = float(theta)
        self.window = int(window)
        self.variant: RopeVariant = variant
        # The caches below are plain attributes, not buffers: they must not enter a state dict
        # (stock Flux folders have none) nor follow `.to(bfloat16)`.
        axis_spectrum(1, 4, window=self.window, variant=variant)  # rejects bad settings early
        # Set by the transformer before each forward pass: diffusers calls this module with ids
        # alone.
        self.grid_hw: tuple[int, int] | None = None
        self._axes: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[int, int, int, str], tuple[Tensor, Tensor]] = {}

    def tables(
        self, text_len: int, tokens_h: int, tokens_w: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Tables in the layout of diffusers' Flux attention (`image_rotary_emb`).

        Text tokens sit at position 0 of every axis; like image tokens they carry the amplitude of
        a stretched axis, as in the released code.

        Args:
            text_len: number of text tokens, 0 allowed.
            tokens_h: image tokens from top to bottom.
            tokens_w: image tokens from left to right.
            device: where the tables live.

        Returns:
            (cos, sin), each (text_len + tokens_h * tokens_w, sum(axes_dims)) float32, every value
            twice in a row. Cached per argument tuple; treat as read-only.
        """
        # Plain ints and a string: a key must not hold tensors, nor depend on how the device was
        # written.
        key = (int(text_len), int(tokens_h), int(tokens_w), str(torch.device(device)))
        if key not in self._tables:
            image_ids = grid_ids(key[1], key[2], device=device)
            ids = torch.cat((image_ids.new_zeros(key[0], 3), image_ids))
            self._tables[key] = self.at_positions(ids, key[1], key[2])
        return self._tables[key]

    def at_positions(self, ids: Tensor, tokens_h: int, tokens_w: int) -> tuple[Tensor, Tensor]:
        """Rows of the tables at given positions, which may be a part of the image only.

        Args:
            ids: (S, 3) integers (stream, row, column) in any dtype that holds them exactly.
            tokens_h: extent of the whole image, not of the part.
            tokens_w: extent of the whole image.

        Returns:
            (cos, sin), each (S, sum(axes_dims)) float32.
        """
        # Tables are looked up, never computed from ids: a phase is the same to the last bit whether
        # the caller holds the whole image or a rank's part, and whatever dtype its ids have.
        rows = ids.long()
        parts = [
            tuple(table[rows[:, axis]] for table in self._axis_tables(axis, extent, ids.device))
            for axis, extent in enumerate((1, tokens_h, tokens_w))
        ]
        cos, sin = zip(*parts, strict=True)
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows at `ids` for the grid set by the owning transformer (`grid_hw`)."""
        if self.grid_hw is None:
            raise ValueError("grid_hw: set the image's extent in tokens first")
        return self.at_positions(ids, *self.grid_hw)

    def _axis_tables(self, axis: int, extent: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(extent, dim) cos and sin of one axis, cached."""
        if torch.compiler.is_compiling():
            # A lookup would tie the graph to what the cache held when it was traced, so a bucket's
            # second call would compile again. The extent is a constant of the graph either way.
            return self._build_axis_tables(axis, extent, device)
        key = (axis, int(extent), str(device))
        if key not in self._axes:
            self._axes[key] = self._build_axis_tables(axis, int(extent), device)
        return self._axes[key]

    def _build_axis_tables(
        self, axis: int, extent: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        # The stream axis has one position; plain frequencies whatever the variant.
        frequencies, amplitude = axis_spectrum(
            extent,
            self.axes_dims[axis],
            window=self.window,
            theta=self.theta,
            variant=self.variant if axis else "flux",
        )
        positions = torch.arange(extent, dtype=torch.float64)
        # Phases in float64: at position 400 float32 would lose 2e-5 rad in the fastest band.
        phases = torch.outer(positions, torch.from_numpy(frequencies))
        return (
            # Neighbouring channels are a rotated pair in Flux, so each phase stands twice in a row.
            (phases.cos() * amplitude).float().repeat_interleave(2, dim=1).to(device),
            (phases.sin() * amplitude).float().repeat_interleave(2, dim=1).to(device),
        )
