"""Opening image files with untrusted bytes in mind: what the header says, no pixel decoded.

The header is read *as seen*: its size is that of the upright picture. What the file stores stands
beside it.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image, UnidentifiedImageError, features

from components.files.whole_files import regular_bytes
from components.images import png_chunks
from components.images.colour_profiles import ColourReading
from components.images.header_facts import (
    SWAPPED_EDGES,
    bit_depth,
    colours_of,
    orientation,
    reading_of,
)
from components.images.image_containers import (
    OPTIONAL_PACKAGES,
    container_family,
    register_optional_formats,
)
from components.images.unread_bytes import known_flaw, raw_of_a_camera, what_it_is
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


def source_bytes(source: ByteSource) -> bytes:
    """All bytes of a path that is a regular file, or of an original.

    Raises:
        OSError: they cannot be had; `strerror` says why.
    """
    return regular_bytes(source) if isinstance(source, Path) else source.read_bytes()


@dataclass(frozen=True)
class ImageHeader:
    """What the header says; no pixel is decoded for it."""

    height: int
    """As seen: of the upright picture."""
    width: int
    format: str
    """PIL's name, such as "JPEG"."""
    mode: str
    """PIL's mode, such as "RGB", "CMYK", "P", "I;16"."""
    frames: int
    """Above 1: animated or multi-page; the first frame counts."""
    stored_height: int
    """In the file, before its orientation is applied."""
    stored_width: int
    orientation: int
    """EXIF's, 1 (upright) to 8; of formats whose decoder turns the picture, 1."""
    color_space: str
    """ "sRGB", another profile's description, "untagged", "Gray: ...", "CMYK: ..." or "Lab"."""
    bit_depth: int
    """Per channel, in the file."""
    has_alpha: bool
    """An alpha channel, or a colour that stands for transparency."""
    notes: tuple[str, ...] = ()
    """What was wrong beside the pixels, such as a broken colour profile."""


@dataclass(frozen=True)
class OpenedImage:
    """A file whose header was read."""

    image: Image.Image
    """PIL's, lazy."""
    header: ImageHeader
    reading: ColourReading
    data: bytes
    """What `image` reads: the file, or what is left of it without broken PNG chunks."""


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
    """Why PIL knows no image in `data`: a decoder that is not installed, or what it is instead."""
    family = container_family(data)
    if family is None:
        found = what_it_is(data)
        return f"not an image that PIL knows{'' if found is None else f' ({found})'}"
    if family in _formats():
        return f"not an image that PIL knows ({family} that is cut or damaged)"
    package = OPTIONAL_PACKAGES.get(family, "pillow built with libavif")
    return f"{family} needs a decoder that is not installed: {package}"


def _lazy(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=list(_formats()))


def _opened_by_pil(data: bytes) -> tuple[Image.Image, bytes, tuple[str, ...]]:
    """PIL's image, the bytes it reads, and notes: a PNG may open without its broken extras only."""
    try:
        return _lazy(data), data, ()
    except Exception as problem:
        # A bomb in a text chunk is no accident.
        bomb = isinstance(problem, ValueError) and "Decompressed data too large" in str(problem)
        if bomb or not data.startswith(png_chunks.SIGNATURE):
            raise
        refusal = problem
    checked = png_chunks.check_chunks(data)
    attempts = [(checked.sound, checked.notes)] if checked.sound is not data else []
    for look in (True, False):
        note = "PNG chunks that the decoder refuses left out"
        attempts.append((png_chunks.without_extras(data, look=look), (*checked.notes, note)))
    for sound, notes in attempts:
        try:
            return _lazy(sound), sound, notes
        except Exception:
            # The first refusal is the one to tell.
            continue
    raise refusal


def _header(image: Image.Image, data: bytes, notes: tuple[str, ...]) -> OpenedImage:
    turned, complaint = orientation(image, data)
    reading = reading_of(image, colours_of(image), data)
    height, width = image.height, image.width
    # PIL gives the size of a TIFF as it will have turned it, of all others as they are stored.
    sizes = [(height, width), (width, height) if turned in SWAPPED_EDGES else (height, width)]
    stored, seen = sizes if image.format != "TIFF" else reversed(sizes)
    header = ImageHeader(
        height=seen[0],
        width=seen[1],
        format=str(image.format),
        mode=image.mode,
        frames=int(getattr(image, "n_frames", 1)),
        stored_height=stored[0],
        stored_width=stored[1],
        orientation=turned,
        color_space=reading.name,
        bit_depth=bit_depth(image, data),
        has_alpha=image.has_transparency_data,
        notes=tuple(note for note in (*notes, complaint, reading.note) if note),
    )
    return OpenedImage(image, header, reading, data)


@contextmanager
def opened(data: bytes, max_megapixels: float) -> Iterator[OpenedImage]:
    """PIL's lazy image and its header, size checked; every decoder error becomes ours.

    Raises:
        ImageUndecodable: empty, unknown, broken, or more than `max_megapixels`.
    """
    if not data:
        raise ImageUndecodable("empty file (0 bytes)")
    try:
        with _pil_without_pixel_limit():
            image, read, notes = _opened_by_pil(data)
            with image:
                megapixels = image.height * image.width / 1e6
                if megapixels > max_megapixels:
                    raise ImageUndecodable(
                        f"too large: {image.height}x{image.width} is {megapixels:.1f} megapixels, "
                        f"limit {max_megapixels:g}"
                    )
                if image.format == "TIFF" and raw_of_a_camera(read, cast(Any, image).tag_v2):
                    raise ImageUndecodable("camera raw: develop it; PIL shows its preview alone")
                yield _header(image, read, notes)
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
        flaw = known_flaw(data)
        raise ImageUndecodable(
            f"cannot decode: {detail}{'' if flaw is None else f' ({flaw})'}"
        ) from None


def read_header(data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> ImageHeader:
    """Probe size, format, orientation and colours without decoding pixels.

    Raises:
        ImageUndecodable: empty, unknown, broken, or more than `max_megapixels`.
    """
    with opened(data, max_megapixels) as found:
        return found.header
