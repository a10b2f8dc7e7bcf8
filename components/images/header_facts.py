"""Facts of a header that PIL has no single word for: orientation, bit depth, what the bands are."""

from __future__ import annotations

import struct
from typing import Any, cast

from PIL import ExifTags, Image

from components.images import png_chunks
from components.images.colour_profiles import (
    UNTAGGED,
    ColourReading,
    Colours,
    coded_reading,
    colour_reading,
    lab_reading,
)

UPRIGHT = 1
SWAPPED_EDGES = (5, 6, 7, 8)
"""Orientations whose upright picture has the stored one's height as its width."""
HIGH_DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""PIL's modes of one channel with more than 8 bits."""
# These decoders turn the picture themselves, whatever the EXIF block beside it says.
_TURNED_BY_DECODER = ("HEIF", "JXL")
_GRAY_MODES = ("1", "L", "LA", "La", *HIGH_DEPTH_MODES)
_TIFF_BITS = 258
_PNG_DEPTH_BYTE, _PNG_COLOUR_BYTE, _PNG_PALETTE = 24, 25, 3
_MODE_BITS = {"1": 1, "I": 32, "F": 32}
_BOXES_SEARCHED = 2**16
# Values of sRGB as the PNG chunks gAMA and cHRM hold them, and how far rounding goes.
_SRGB_GAMMA, _SRGB_CHROMATICITY = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_GAMMA_ROUNDING, _CHROMATICITY_ROUNDING = 0.01, 0.005


def _exif(image: Image.Image, data: bytes) -> Image.Exif:
    """The EXIF block (or the orientation that XMP names) without decoding a pixel for it."""
    if image.format != "PNG" or "exif" in image.info:
        return image.getexif()
    # PNG may hold it behind the pixels, which PIL would decode to get there.
    content = png_chunks.find_chunk(data, b"eXIf")
    if content is None:
        return Image.Image.getexif(image)
    exif = Image.Exif()
    exif.load(content)
    return exif


def orientation(image: Image.Image, data: bytes) -> tuple[int, str | None]:
    """(1 to 8, complaint or None): how the stored picture is to be turned.

    Args:
        image: PIL's, not loaded yet.
        data: the file.
    """
    if image.format in _TURNED_BY_DECODER:
        return UPRIGHT, None
    try:
        found: Any = _exif(image, data).get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:
        # EXIF blocks are as untrusted as all else, and say nothing about the pixels.
        return UPRIGHT, "broken EXIF block, taken as upright"
    if isinstance(found, int) and 1 <= found <= 8:
        return found, None
    return UPRIGHT, f"EXIF orientation {str(found)[:20]} does not exist, taken as upright"


def colours_of(image: Image.Image) -> Colours:
    """What the bands of a picture are, alpha aside."""
    if image.mode in ("CMYK", "LAB"):
        return cast(Colours, image.mode)
    return "L" if image.mode in _GRAY_MODES else "RGB"


def _codes(image: Image.Image, data: bytes) -> tuple[int, int, bool] | None:
    """(primaries, transfer, full range) by the chunk `cICP` or the box `colr` of type `nclx`."""
    if image.format == "PNG":
        content = png_chunks.find_chunk(data, b"cICP")
        return (content[0], content[1], content[3] == 1) if content and len(content) == 4 else None
    at = data.find(b"colrnclx", 0, _BOXES_SEARCHED)
    if image.format not in ("AVIF", "HEIF") or at == -1 or at + 12 > len(data):
        return None
    # Matrix and range are for the way to red, green and blue, which the decoder goes.
    return (*struct.unpack_from(">HH", data, at + 8), True)


def _untagged_png(image: Image.Image) -> ColourReading:
    """Without a profile: the chunk sRGB, else gAMA and cHRM, which are not applied."""
    if "srgb" in image.info:
        return ColourReading("sRGB")
    notes = []
    gamma = image.info.get("gamma", _SRGB_GAMMA)
    if abs(gamma - _SRGB_GAMMA) > _GAMMA_ROUNDING:
        notes.append(f"PNG gamma {gamma:g} not applied")
    primaries = image.info.get("chromaticity", _SRGB_CHROMATICITY)
    pairs = zip(primaries, _SRGB_CHROMATICITY, strict=True)
    if any(abs(own - usual) > _CHROMATICITY_ROUNDING for own, usual in pairs):
        notes.append("PNG chromaticities not applied")
    return ColourReading(UNTAGGED, note=", ".join(notes) or None)


def reading_of(image: Image.Image, colours: Colours, data: bytes) -> ColourReading:
    """How its colours become sRGB.

    Args:
        image: PIL's, not loaded yet.
        colours: of its bands.
        data: the file.
    """
    if colours == "LAB":
        return lab_reading()
    codes = _codes(image, data) if image.format in ("PNG", "AVIF", "HEIF") else None
    # In a PNG they overrule a profile (3rd edition, 4.3); elsewhere a profile says more.
    if codes is not None and (image.format == "PNG" or not image.info.get("icc_profile")):
        if not codes[2]:
            return ColourReading(UNTAGGED, note="cICP of a narrow range not applied")
        return coded_reading(*codes[:2])
    icc = image.info.get("icc_profile")
    if icc:
        return colour_reading(bytes(icc), colours)
    if colours == "CMYK":
        return ColourReading(f"CMYK: {UNTAGGED}", note="CMYK without a profile")
    return _untagged_png(image) if image.format == "PNG" else ColourReading(UNTAGGED)


def _container_bits(data: bytes) -> int | None:
    """Bits of the first channel by an AVIF or HEIF file's `pixi` box (ISO/IEC 23008-12, 6.5.6)."""
    at = data.find(b"pixi", 0, _BOXES_SEARCHED)
    # Version and flags, number of channels, bits of each.
    return data[at + 9] if at != -1 and at + 9 < len(data) else None


def bit_depth(image: Image.Image, data: bytes) -> int:
    """Bits per channel in the file; of a palette those of its colours."""
    if image.format == "PNG" and len(data) > _PNG_COLOUR_BYTE:
        palette = data[_PNG_COLOUR_BYTE] == _PNG_PALETTE
        return 8 if palette else data[_PNG_DEPTH_BYTE]
    if image.format == "TIFF":
        bits = cast(Any, image).tag_v2.get(_TIFF_BITS, (1,))
        return 8 if image.mode == "P" else int(max(bits))
    if image.format in ("AVIF", "HEIF") and (bits := _container_bits(data)) is not None:
        return bits
    return _MODE_BITS.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def sample_range(image: Image.Image) -> tuple[int | None, bool]:
    """(largest value that the file's depth can hold or None, whether 0 is white).

    Known for 12 and 16 bits without sign; what fills 32 bits or is a fraction has no such bound.
    """
    tags = getattr(image, "tag_v2", None)
    white_is_zero = tags is not None and tags.get(262) == 0
    if not image.mode.startswith("I;16"):
        return None, white_is_zero
    bits = int(max(tags.get(_TIFF_BITS, (16,)))) if tags is not None else 16
    return 2**bits - 1, white_is_zero
