"""A decoded file as a viewer shows it: upright, in sRGB, on white, its whole range in 8 bits.

Order as in browsers: colours to sRGB, then transparency over white, then the turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from components.images.arrays import ImageArray
from components.images.colour_profiles import ColourReading, to_srgb
from components.images.header_facts import (
    HIGH_DEPTH_MODES,
    colours_of,
    sample_range,
)

_WHITE = 255
_STRIP_PIXELS = 2**20
# Full scales of whole numbers in 32 bits: what fits into one of them was made for it.
_WHOLE_SCALES = (255, 65535)


@dataclass(frozen=True)
class Bands:
    """A decoded file before any policy: its own bands, and how transparent each pixel is."""

    colours: ImageArray
    """(H, W) gray, (H, W, 3) RGB or Lab, (H, W, 4) CMYK with 255 full ink."""
    alpha: ImageArray | None
    """(H, W), 255 opaque; None: no pixel is transparent."""
    note: str | None = None


def scaled_to_8_bits(values: np.ndarray, full_scale: int | None) -> tuple[ImageArray, str | None]:
    """One channel of any depth as 8 bits: scaled, never clipped.

    Without a full scale, whole numbers get the smallest of 255, 65535 and their maximum that holds
    them all, fractions 1 or their maximum; negative values move black down to the minimum. Infinite
    values become the ends of what is finite, NaN black.

    Args:
        values: (H, W).
        full_scale: the value that is white, if the file's depth says so.

    Returns:
        (H, W) uint8, and a note where the range was taken from the values.

    Raises:
        ValueError: not one value is finite.
    """
    if full_scale is not None:
        # Whole numbers: rounded to the nearest of 256 levels.
        return ((values.astype(np.uint32) * 255 + full_scale // 2) // full_scale).astype(
            np.uint8
        ), None
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no pixel is a finite number")
    low, high = float(finite.min()), float(finite.max())
    scales = _WHOLE_SCALES if np.issubdtype(values.dtype, np.integer) else (1,)
    top = next((scale for scale in scales if high <= scale), high)
    bottom = min(low, 0.0)
    note = None if bottom == 0.0 and top in scales else "scaled to its own range"
    known = np.nan_to_num(values.astype(np.float64), nan=bottom, posinf=high, neginf=low)
    span = top - bottom or 1.0
    return np.rint((known - bottom) * (255 / span)).astype(np.uint8), note


def bands_of(image: Image.Image) -> Bands:
    """Decode PIL's image into its own bands.

    Raises:
        Exception: whatever PIL's decoder raises on broken bytes.
    """
    colours = colours_of(image)
    if image.mode in HIGH_DEPTH_MODES:
        full_scale, white_is_zero = sample_range(image)
        key = image.info.get("transparency")
        values = np.asarray(image)
        gray, note = scaled_to_8_bits(values, full_scale)
        if white_is_zero:
            gray = 255 - gray
        alpha = np.where(values == key, np.uint8(0), np.uint8(255)) if key is not None else None
        return Bands(gray, alpha, note)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        found = rgba[..., 0] if colours == "L" else rgba[..., :3]
        return Bands(found, rgba[..., 3])
    if colours in ("CMYK", "LAB"):
        return Bands(np.asarray(image), None)
    return Bands(np.asarray(image.convert(colours)), None)


def transparent_share(alpha: ImageArray | None) -> float:
    """Mean transparency of a picture: 0 opaque, 1 invisible."""
    if alpha is None:
        return 0.0
    return 1.0 - int(alpha.sum(dtype=np.int64)) / (_WHITE * alpha.size)


def gray_as_rgb(gray: ImageArray) -> ImageArray:
    """(H, W) as (H, W, 3)."""
    return np.repeat(gray[..., None], 3, axis=-1)


def _on_white(pixels: ImageArray, alpha: ImageArray) -> ImageArray:
    """Composite over white, in sRGB values as browsers do, rounded to nearest."""
    result = np.empty_like(pixels)
    rows = max(1, _STRIP_PIXELS // pixels.shape[1])
    for top in range(0, pixels.shape[0], rows):
        strip = slice(top, top + rows)
        cover = alpha[strip, :, None].astype(np.uint32)
        mixed = pixels[strip] * cover + _WHITE * (255 - cover)
        result[strip] = (mixed + 127) // 255
    return result


def upright(pixels: ImageArray, orientation: int) -> ImageArray:
    """Turn a stored picture by its EXIF orientation (CIPA DC-008, 4.6.5).

    Args:
        pixels: (H, W, 3).
        orientation: 1 to 8.

    Returns:
        contiguous; `pixels` itself for 1.
    """
    turned = {
        1: lambda: pixels,
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.swapaxes(0, 1),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: pixels[::-1, ::-1].swapaxes(0, 1),
        8: lambda: np.rot90(pixels),
    }[orientation]()
    return np.ascontiguousarray(turned)


def viewed(bands: Bands, reading: ColourReading, orientation: int) -> ImageArray:
    """(H, W, 3) sRGB, upright and opaque.

    Args:
        bands: of the file; RGB where `reading` has no transform.
        reading: of its profile.
        orientation: still to be applied; 1 where the decoder has.
    """
    pixels = bands.colours
    if reading.transform is not None:
        if reading.source == "RGB" and pixels.ndim == 2:
            pixels = gray_as_rgb(pixels)
        elif reading.source == "L" and pixels.ndim == 3:
            # libjpeg has given gray three times.
            pixels = pixels[..., 0]
        pixels = to_srgb(pixels, reading)
    if bands.alpha is not None:
        pixels = _on_white(pixels, bands.alpha)
    return upright(pixels, orientation)
