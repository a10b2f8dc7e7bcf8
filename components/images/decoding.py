"""Image bytes to RGB pixels under two named policies.

*As seen* (`decode_rgb`, `read_rgb`): what a viewer shows. Upright, colours brought to sRGB by the
file's profile, transparency over white, 16 bits and fractions scaled to their range. Everything
that looks at a photograph, trains on it or counts its size reads it so.

*As stored* (`decode_as_stored`, `read_as_stored`): the semantics of the released UltraFlux
filtering tool, PIL's `convert("RGB")`: no turn, alpha dropped, profiles ignored. Only the published
signals read it so. Deviation: what PIL clips (16-bit gray, floats) or refuses (Lab) is scaled or
converted as in *as seen*, because a white rectangle is no signal (tested).

`decode_both` gives both from one decode; on a plain sRGB photograph they are one array.
JPEGs are decoded by libjpeg-turbo in strict mode, which gives PIL's pixels and also reports damage
that PIL silently paints over.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from components.files.whole_files import NotRegularFile
from components.images import (
    as_seen,
    colour_profiles,
    header_facts,
    image_containers,
    image_files,
    jpeg_scans,
    png_chunks,
    unread_bytes,
)
from components.images.arrays import ImageArray
from components.images.as_seen import (
    Bands,
    bands_of,
    gray_as_rgb,
    transparent_share,
    upright,
    viewed,
)
from components.images.colour_profiles import to_srgb
from components.images.header_facts import HIGH_DEPTH_MODES, UPRIGHT
from components.images.image_files import (
    MAX_MEGAPIXELS,
    ByteSource,
    ImageHeader,
    ImageUndecodable,
    OpenedImage,
    opened,
    read_header,
    source_bytes,
)
from components.images.jpeg_scans import JpegPixels, decode_strictly
from components.images.png_chunks import missing_rows
from components.images.scratch import Scratch

_CMYK_BANDS = 4
SEEN = "as seen, 2"
"""Version of the policy *as seen*; another one whenever a file that is not plain is read otherwise.

1: orientation, profiles, alpha, depth. 2: colours named by numbers (`cICP`, `nclx`).
"""
DECIDING_MODULES = (
    as_seen,
    colour_profiles,
    header_facts,
    image_containers,
    image_files,
    jpeg_scans,
    png_chunks,
    unread_bytes,
)
"""What decides pixels beside this module: for digests of the code that rows depend on."""

__all__ = [
    "MAX_MEGAPIXELS",
    "SEEN",
    "ByteSource",
    "DecodedImage",
    "ImageHeader",
    "ImageUndecodable",
    "decode_as_stored",
    "decode_both",
    "decode_rgb",
    "is_plain",
    "read_as_stored",
    "read_header",
    "read_rgb",
]


def is_plain(header: ImageHeader) -> bool:
    """Whether every policy reads a picture alike: upright, 8 bits, opaque, gray or RGB as sRGB."""
    return (
        header.orientation == UPRIGHT
        and header.mode in ("RGB", "L")
        and header.bit_depth == 8
        and not header.has_alpha
        and header.color_space in (colour_profiles.SRGB, colour_profiles.UNTAGGED)
    )


@dataclass(frozen=True)
class DecodedImage:
    """Pixels and what happened on the way."""

    pixels: ImageArray
    """(H, W, 3) uint8, RGB."""
    header: ImageHeader
    integrity: str
    """ "ok", or how the file is damaged although pixels could be read."""
    note: str | None
    """Conversion that lost something, or what is wrong beside the pixels."""
    quantization: dict[int, list[int]] | None
    """A JPEG's quantisation tables by number, 64 steps each in row order; None for others."""
    alpha_fraction: float
    """Mean transparency, 0 opaque to 1."""


class _Decoded:
    """A file's own bands; both readings are made from them, while the file is open."""

    def __init__(self, found: OpenedImage, bands: Bands, integrity: str, note: str | None) -> None:
        self._found = found
        self._bands = bands
        self._integrity = integrity
        self._note = note

    @functools.cached_property
    def stored(self) -> ImageArray:
        """PIL's `convert("RGB")`, or what stands for it where PIL clips or refuses."""
        colours = self._bands.colours
        mode = self._found.header.mode
        if mode == "LAB":
            return to_srgb(colours, self._found.reading)
        if mode not in HIGH_DEPTH_MODES and self._bands.alpha is not None:
            return np.asarray(self._found.image.convert("RGB"))
        if colours.ndim == 2:
            return gray_as_rgb(colours)
        if colours.shape[2] == _CMYK_BANDS:
            image = Image.frombuffer("CMYK", (colours.shape[1], colours.shape[0]), colours)
            return np.asarray(image.convert("RGB"))
        return colours

    @functools.cached_property
    def seen(self) -> ImageArray:
        """What a viewer shows; `stored` itself where the two agree."""
        header, reading, alpha = self._found.header, self._found.reading, self._bands.alpha
        # PIL turns a TIFF when it loads it.
        turn = UPRIGHT if header.format == "TIFF" else header.orientation
        if alpha is not None and bool((alpha == 255).all()):
            alpha = None
        colours = self._bands.colours if reading.transform is not None else None
        if colours is None and alpha is None:
            return upright(self.stored, turn)
        return viewed(
            Bands(self._opaque_rgb() if colours is None else colours, alpha), reading, turn
        )

    def _opaque_rgb(self) -> ImageArray:
        """Colours without a profile under an alpha channel, which `stored` would convert again."""
        colours = self._bands.colours
        return gray_as_rgb(colours) if colours.ndim == 2 else colours

    def facts(self, pixels: ImageArray, extras: tuple[str, ...]) -> DecodedImage:
        header = self._found.header
        notes = [*extras, *header.notes, *([self._note] if self._note else [])]
        if header.mode != "RGB":
            notes.append(f"{header.mode} converted to RGB")
        if header.frames > 1:
            notes.append(f"first of {header.frames} frames")
        return DecodedImage(
            pixels=pixels,
            header=header,
            integrity=self._integrity,
            note=", ".join(dict.fromkeys(notes)) or None,
            quantization=getattr(self._found.image, "quantization", None),
            alpha_fraction=transparent_share(self._bands.alpha),
        )


def _strict_jpeg(found: OpenedImage, scratch: Scratch | None) -> JpegPixels:
    header = found.header
    if header.mode == "CMYK":
        return decode_strictly(found.data, "CMYK")
    shape = (header.stored_height, header.stored_width, 3)
    return decode_strictly(
        found.data, "RGB", None if scratch is None else scratch.take("rgb", shape)
    )


def _ends_in_zeros(image: Image.Image) -> bool:
    """Whether one of the last two rows is what PIL leaves of rows that never came.

    Two, because an interlaced file brings the even and the odd ones apart.
    """
    rows = range(max(0, image.height - 2), image.height)
    return any(not np.asarray(image.crop((0, y, image.width, y + 1))).any() for y in rows)


def _decoded(found: OpenedImage, scratch: Scratch | None, damage: str | None) -> _Decoded:
    header = found.header
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L", "CMYK"):
        strict = _strict_jpeg(found, scratch)
        if strict.pixels is not None:
            return _Decoded(found, Bands(strict.pixels, None), "ok", strict.note)
        damage = strict.damage
    bands = bands_of(found.image)
    if header.format == "PNG" and damage is None and _ends_in_zeros(found.image):
        damage = "PNG whose pixels end before the last row" if missing_rows(found.data) else None
    return _Decoded(found, bands, damage or "ok", bands.note)


@contextmanager
def _decoding(
    data: bytes, max_megapixels: float, scratch: Scratch | None = None
) -> Iterator[tuple[_Decoded, tuple[str, ...]]]:
    """The bands of a file, and what was left out of it before it was opened."""
    damage: str | None = None
    extras: tuple[str, ...] = ()
    if data.startswith(png_chunks.SIGNATURE):
        checked = png_chunks.check_chunks(data)
        damage, extras, data = checked.damage, checked.notes, checked.sound
    with opened(data, max_megapixels) as found:
        yield _decoded(found, scratch, damage), extras


def decode_rgb(
    data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS, scratch: Scratch | None = None
) -> DecodedImage:
    """Decode an image file *as seen*: upright, in sRGB, on white (see the module's docstring).

    16-bit, CMYK, palette and animated files (first frame) get a note.

    Args:
        data: the file's bytes.
        max_megapixels: larger headers are refused before anything is decoded.
        scratch: memory that JPEGs are decoded into; their pixels are valid until it is used for
            the next image (None: pixels of their own).

    Raises:
        ImageUndecodable: no pixels can be had.
    """
    with _decoding(data, max_megapixels, scratch) as (decoded, extras):
        return decoded.facts(decoded.seen, extras)


def decode_as_stored(data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> DecodedImage:
    """Decode an image file *as stored*, for the published signals alone.

    Raises:
        ImageUndecodable: no pixels can be had.
    """
    with _decoding(data, max_megapixels) as (decoded, extras):
        return decoded.facts(decoded.stored, extras)


def decode_both(
    data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS, scratch: Scratch | None = None
) -> tuple[DecodedImage, ImageArray]:
    """Decode once for both policies; arguments as for `decode_rgb`.

    Returns:
        the picture *as seen*, and the pixels *as stored*: the same array where the two agree.

    Raises:
        ImageUndecodable: no pixels can be had.
    """
    with _decoding(data, max_megapixels, scratch) as (decoded, extras):
        return decoded.facts(decoded.seen, extras), decoded.stored


def image_bytes(source: ByteSource) -> bytes:
    """The bytes of an image file; of a pipe or a device none are waited for.

    Raises:
        ImageUndecodable: not a regular file, or unreadable.
    """
    try:
        return source_bytes(source)
    except NotRegularFile as problem:
        raise ImageUndecodable(str(problem.strerror)) from None
    except OSError as problem:
        raise ImageUndecodable(f"cannot read: {problem.strerror}") from None


def read_rgb(path: ByteSource, *, max_megapixels: float = MAX_MEGAPIXELS) -> DecodedImage:
    """`decode_rgb` of a file: what a viewer shows.

    Raises:
        ImageUndecodable: unreadable file or no pixels.
    """
    return decode_rgb(image_bytes(path), max_megapixels=max_megapixels)


def read_as_stored(path: ByteSource, *, max_megapixels: float = MAX_MEGAPIXELS) -> DecodedImage:
    """`decode_as_stored` of a file.

    Raises:
        ImageUndecodable: unreadable file or no pixels.
    """
    return decode_as_stored(image_bytes(path), max_megapixels=max_megapixels)
