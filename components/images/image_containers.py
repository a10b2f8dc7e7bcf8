"""Newer image formats: told apart by their first bytes, decoded by packages that may be missing.

AVIF comes with Pillow; JPEG XL and HEIF are the extra `formats`. A file of a format without a
decoder is a row that names the package, not a mystery.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

OPTIONAL_PACKAGES = {"JXL": "pillow-jxl-plugin", "HEIF": "pillow-heif"}
"""By the name under which the package registers with PIL."""

JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")
"""A bare codestream, and the container (ISO/IEC 18181-2)."""

AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})


def brands(prefix: bytes) -> Iterator[bytes]:
    """Brands of a file type box (ISO 14496-12): major first, then compatible; none elsewhere."""
    if prefix[4:8] != b"ftyp":
        return
    yield prefix[8:12]
    end = min(int.from_bytes(prefix[:4], "big"), len(prefix))
    yield from (prefix[at : at + 4] for at in range(16, end, 4))


def container_family(prefix: bytes) -> str | None:
    """Which of AVIF, HEIF and JXL a file is by its magic bytes, or None.

    Args:
        prefix: the first bytes; brands beyond them are not seen.
    """
    if prefix.startswith(JXL_STARTS):
        return "JXL"
    # AVIF first: its files name mif1 as a compatible brand, too.
    named = set(brands(prefix[:1024]))
    if named & AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if named & _HEIF_BRANDS else None


def register_optional_formats() -> None:
    """Let PIL open JPEG XL and HEIF where the packages are installed."""
    with contextlib.suppress(ImportError):
        # Registers itself when imported.
        importlib.import_module("pillow_jxl")
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
