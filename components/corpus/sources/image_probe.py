"""What the first bytes of a file say: its kind, by magic bytes, its size and its header's columns.

Nothing is decoded. Names and declared content types are never believed.
"""

from __future__ import annotations

from typing import Any

from components.images.decoding import ImageHeader, ImageUndecodable, read_header
from components.images.image_containers import container_family

PROBE_BYTES = 65536
"""Enough for the header of nearly every photograph, also behind EXIF and a colour profile."""

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_CONTAINERS = {"JXL": ".jxl", "AVIF": ".avif", "HEIF": ".heic"}
_WEBP_HEADER_BYTES = 30
OWN_SIZES = frozenset({".webp", ".avif", ".heic"})
"""Formats whose size `image_size` finds without Pillow, whose plugins want the whole file."""


def image_extension(prefix: bytes) -> str | None:
    """File ending with the dot for the image formats of the corpus, or None.

    Args:
        prefix: the first bytes, 32 are enough.
    """
    if prefix.startswith(_JPEG):
        return ".jpg"
    if prefix.startswith(_PNG):
        return ".png"
    if prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP":
        return ".webp"
    if prefix.startswith(_TIFF):
        return ".tif"
    # AVIF and HEIF are one container: which it is stands in its list of brands, not in the magic
    # bytes.
    return _CONTAINERS.get(container_family(prefix) or "")


def _webp_size(prefix: bytes) -> tuple[int, int] | None:
    """(height, width) from the first chunk of a WebP file (RFC 9649, sections 2.5 to 2.7)."""
    if len(prefix) < _WEBP_HEADER_BYTES:
        return None
    kind = prefix[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(prefix[24:27], "little") + 1
        return int.from_bytes(prefix[27:30], "little") + 1, width
    if kind == b"VP8L":
        bits = int.from_bytes(prefix[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width = int.from_bytes(prefix[26:28], "little") & 0x3FFF
        return int.from_bytes(prefix[28:30], "little") & 0x3FFF, width
    return None


def _avif_size(prefix: bytes) -> tuple[int, int] | None:
    """(height, width) of the largest item: a grid's own extent is above that of its tiles."""
    sizes = []
    # Searched for, not parsed: the boxes around it nest differently in every encoder's files, and
    # what is found too much (a thumbnail) is smaller than the image.
    at = prefix.find(b"ispe")
    while at != -1 and at + 16 <= len(prefix):
        width = int.from_bytes(prefix[at + 8 : at + 12], "big")
        sizes.append((int.from_bytes(prefix[at + 12 : at + 16], "big"), width))
        at = prefix.find(b"ispe", at + 16)
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def image_size(prefix: bytes) -> tuple[int, int] | None:
    """(height, width) if the first bytes tell, else None; upright or as stored, by the format.

    Args:
        prefix: usually the first `PROBE_BYTES`.
    """
    extension = image_extension(prefix)
    if extension in OWN_SIZES:
        return _webp_size(prefix) if extension == ".webp" else _avif_size(prefix)
    if extension is None:
        return None
    try:
        # Too large is for the caller to judge; here an answer is wanted for every size.
        header = read_header(prefix, max_megapixels=float("inf"))
    except ImageUndecodable:
        return None
    return header.height, header.width


def header_columns(header: ImageHeader, size_bytes: int) -> dict[str, Any]:
    """Manifest columns of a readable header: sizes as seen, and what the file stores beside them.

    Args:
        header: of the file.
        size_bytes: of the file.
    """
    pixels = header.height * header.width
    return {
        "width": header.width,
        "height": header.height,
        "megapixels": pixels / 1e6,
        "aspect_ratio": header.width / header.height,
        "stored_width": header.stored_width,
        "stored_height": header.stored_height,
        "orientation": header.orientation,
        "color_space": header.color_space,
        "bit_depth": header.bit_depth,
        "has_alpha": header.has_alpha,
        "format": header.format,
        "bytes_per_pixel": size_bytes / pixels,
        "decode_note": ", ".join(header.notes) or None,
    }
