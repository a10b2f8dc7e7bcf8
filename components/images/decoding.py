"""Image bytes to RGB pixels, with untrusted files in mind.

The semantics are those of the released UltraFlux filtering tool: PIL's `convert("RGB")`, no EXIF
rotation, alpha dropped, colour profiles ignored. JPEGs are decoded once by libjpeg-turbo in strict
mode, which gives the same pixels and also reports damage that PIL silently paints over.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError, features

from components.images.image_containers import (
    OPTIONAL_PACKAGES,
    container_family,
    register_optional_formats,
)
from components.images.scratch import Scratch
from components.settings.bad_input import BadInput

MAX_MEGAPIXELS = 400.0
"""Default bound on decoded size; the pipeline takes `ingest.max_megapixels`."""

_pil_limit_lock = threading.Lock()


class ImageUndecodable(BadInput, ValueError):
    """The file cannot be turned into pixels; the message is one short line saying why."""


class ByteSource(Protocol):
    """Where the bytes of a file come from: a path, or an original that is looked up."""

    def read_bytes(self) -> bytes:
        """All of them.

        Raises:
            OSError: they cannot be had; `strerror` says why.
        """
        ...


@dataclass(frozen=True)
class ImageHeader:
    """What the header says; no pixel is decoded for it."""

    height: int
    width: int
    format: str
    """PIL's name, such as "JPEG"."""
    mode: str
    """PIL's mode, such as "RGB", "CMYK", "P", "I;16"."""
    frames: int
    """Above 1: animated or multi-page; the first frame counts."""


@dataclass(frozen=True)
class DecodedImage:
    """Pixels and what happened on the way."""

    pixels: np.ndarray
    """(H, W, 3) uint8, RGB."""
    header: ImageHeader
    integrity: str
    """ "ok", or how the file is damaged although pixels could be read."""
    note: str | None
    """Conversion that lost something, such as "CMYK converted to RGB"."""
    quantization: dict[int, list[int]] | None
    """A JPEG's quantisation tables by number, 64 steps each in row order; None for others."""


@contextmanager
def _pil_without_pixel_limit() -> Iterator[None]:
    """Let PIL open large headers; the caller compares with its own limit.

    PIL's limit is a global of the process, so it is set under a lock and put back.
    """
    with _pil_limit_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = previous


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats of photographs that this PIL reads; whatever else it knows is none.

    PostScript, for one, would start Ghostscript on bytes that somebody named .jpg.
    """
    optional = [name for name in ("WEBP", "AVIF") if features.check(name.lower())]
    register_optional_formats()
    optional += [name for name in OPTIONAL_PACKAGES if name in Image.OPEN]
    return ("JPEG", "PNG", "TIFF", "GIF", "BMP", *optional)


def _unknown(data: bytes) -> str:
    """Why PIL knows no image in `data`: a decoder that is not installed, or nothing it ever is."""
    family = container_family(data)
    if family is None or family in _formats():
        return "not an image that PIL knows"
    package = OPTIONAL_PACKAGES.get(family, "pillow built with libavif")
    return f"{family} needs a decoder that is not installed: {package}"


@contextmanager
def _opened(data: bytes, max_megapixels: float) -> Iterator[tuple[Image.Image, ImageHeader]]:
    """PIL's lazy image and its header, size checked; every decoder error becomes ours."""
    if not data:
        raise ImageUndecodable("empty file (0 bytes)")
    try:
        with (
            _pil_without_pixel_limit(),
            Image.open(io.BytesIO(data), formats=list(_formats())) as image,
        ):
            header = ImageHeader(
                height=image.height,
                width=image.width,
                format=str(image.format),
                mode=image.mode,
                frames=int(getattr(image, "n_frames", 1)),
            )
            megapixels = image.height * image.width / 1e6
            if megapixels > max_megapixels:
                raise ImageUndecodable(
                    f"too large: {header.height}x{header.width} is {megapixels:.1f} megapixels, "
                    f"limit {max_megapixels:g}"
                )
            yield image, header
    except ImageUndecodable:
        raise
    except UnidentifiedImageError:
        raise ImageUndecodable(_unknown(data)) from None
    except MemoryError:
        # Not the file's fault alone: the engine retries and then quarantines.
        raise
    except Exception as problem:
        # Decoders of untrusted bytes raise whatever they like (OSError, SyntaxError, struct.error).
        detail = " ".join(str(problem).split()) or type(problem).__name__
        raise ImageUndecodable(f"cannot decode: {detail}") from None


def read_header(data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> ImageHeader:
    """Probe size and format without decoding pixels; EXIF orientation is not applied.

    Raises:
        ImageUndecodable: empty, unknown, broken, or more than `max_megapixels`.
    """
    with _opened(data, max_megapixels) as (_, header):
        return header


def _conversion_note(header: ImageHeader) -> str | None:
    notes = []
    if header.mode != "RGB":
        notes.append(f"{header.mode} converted to RGB")
    if header.frames > 1:
        notes.append(f"first of {header.frames} frames")
    return ", ".join(notes) or None


def _decode_jpeg_strictly(
    data: bytes, header: ImageHeader, scratch: Scratch | None
) -> np.ndarray | str:
    """Pixels, or the message of the first irregularity that libjpeg-turbo reports."""
    buffer = None if scratch is None else scratch.take("rgb", (header.height, header.width, 3))
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=True)
    except ValueError as problem:
        return " ".join(str(problem).split()).lower()
    return pixels


def decode_rgb(
    data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS, scratch: Scratch | None = None
) -> DecodedImage:
    """Decode an image file to RGB exactly as PIL's `convert("RGB")` does.

    16-bit, CMYK, palette and animated files are converted as PIL converts them (first frame) and
    get a note.

    Args:
        data: the file's bytes.
        max_megapixels: larger headers are refused before anything is decoded.
        scratch: memory that JPEGs are decoded into; their pixels are valid until it is used for
            the next image (None: pixels of their own).

    Raises:
        ImageUndecodable: no pixels can be had.
    """
    integrity = "ok"
    with _opened(data, max_megapixels) as (image, header):
        note = _conversion_note(header)
        quantization = getattr(image, "quantization", None)
        if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
            strict = _decode_jpeg_strictly(data, header, scratch)
            if isinstance(strict, np.ndarray):
                return DecodedImage(strict, header, integrity, note, quantization)
            integrity = strict
        pixels = np.asarray(image.convert("RGB"))
    return DecodedImage(pixels, header, integrity, note, quantization)


def read_rgb(path: ByteSource, *, max_megapixels: float = MAX_MEGAPIXELS) -> DecodedImage:
    """`decode_rgb` of a file.

    Raises:
        ImageUndecodable: unreadable file or no pixels.
    """
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise ImageUndecodable(f"cannot read: {problem.strerror}") from None
    return decode_rgb(data, max_megapixels=max_megapixels)
