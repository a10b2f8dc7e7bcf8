"""Pictures inside a self-contained page: data URIs of files and of small JPEG copies."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

_JPEG_QUALITY = 82


def data_uri(data: bytes, mime: str) -> str:
    """`data:` URI of `data`."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail_uri(image: Image.Image, long_edge_px: int) -> str:
    """JPEG data URI with the long edge at most `long_edge_px`; metadata is left behind.

    Args:
        image: any mode.
        long_edge_px: in pixels.
    """
    small = image.convert("RGB")
    small.thumbnail((long_edge_px, long_edge_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return data_uri(buffer.getvalue(), "image/jpeg")


def clean_png(path: Path) -> bytes:
    """A picture as PNG of its pixels alone: text chunks of the file do not enter a page."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture_uri(path: Path, long_edge_px: int) -> str:
    """A PNG as it is when it fits into `long_edge_px`, else a JPEG copy that does."""
    with Image.open(path) as image:
        if max(image.size) > long_edge_px:
            return thumbnail_uri(image, long_edge_px)
    return data_uri(clean_png(path), "image/png")
