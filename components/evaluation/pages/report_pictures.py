"""What a report holds of large pictures: thumbnails, one native crop each, whole ones for a few.

195 pairs at 4096 x 4096 are gigabytes; a page that opens at once has room for some 60 MB. So every
picture gets a thumbnail, and a crop of its native pixels as long as there is room (all pictures of
an item at one place, chosen by the detail of the systems together). What is left goes to the whole
native pixels of the worst cases. Crops and tiles are lossy copies for eyes, never for measuring.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from components.evaluation.judge.exhibits import detailed_places
from components.files.whole_files import regular_bytes
from components.images.arrays import ImageArray
from components.images.decoding import MAX_MEGAPIXELS, ImageUndecodable, decode_rgb

THUMBNAIL_PX = 256
CROP_PX = 512
TILE_PX = 1024
_THUMBNAIL_QUALITY, _CROP_QUALITY, _TILE_QUALITY = 80, 88, 90
CROP_MIME, TILE_MIME = "image/webp", "image/jpeg"


class PictureChanged(ValueError):
    """A file is gone or is no longer the one that was measured."""


@dataclass(frozen=True)
class Source:
    """A file that was measured."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """One picture's share of the page."""

    height: int
    width: int
    thumbnail: bytes
    """JPEG, long edge at most `THUMBNAIL_PX`."""
    crop: bytes
    """WebP of native pixels."""
    crop_box: tuple[int, int, int, int]
    """(y, x, height, width)."""


def read_source(source: Source, *, max_megapixels: float = MAX_MEGAPIXELS) -> ImageArray | None:
    """Pixels of a file that was measured, None where they could not be decoded then either.

    Raises:
        PictureChanged: the file is gone, or has another digest than the one measured.
    """
    try:
        data = regular_bytes(source.path)
    except OSError as problem:
        raise PictureChanged(
            f"{source.path}: {problem.strerror}; put it back, or run ultraflux evaluate again"
        ) from None
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise PictureChanged(
            f"{source.path}: not the picture that was measured; run ultraflux evaluate again"
        )
    try:
        return decode_rgb(data, max_megapixels=max_megapixels).pixels
    except ImageUndecodable:
        return None


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def crop_box(pictures: list[ImageArray]) -> tuple[int, int, int, int]:
    """(y, x, height, width) of the crop that all pictures of an item show.

    The most detailed tile of the first two (`detailed_places`), or of the first one where their
    sizes differ; the middle of pictures that are hardly larger than a crop.
    """
    first = pictures[0]
    second = next((p for p in pictures[1:2] if p.shape == first.shape), first)
    height, width = first.shape[:2]
    crop_height, crop_width = min(CROP_PX, height), min(CROP_PX, width)
    places = detailed_places(first, second)
    y, x = places[0] if places else ((height - crop_height) // 2, (width - crop_width) // 2)
    return y, x, crop_height, crop_width


def prepare_item(
    sources: Mapping[str, Source], *, max_megapixels: float = MAX_MEGAPIXELS
) -> dict[str, Prepared]:
    """Thumbnails and crops of one item, by system; undecodable pictures are left out.

    Args:
        sources: by system, of one prompt or photograph.
        max_megapixels: larger files are not decoded.

    Raises:
        PictureChanged: see `read_source`.
    """
    read = {s: read_source(f, max_megapixels=max_megapixels) for s, f in sources.items()}
    pictures = {system: pixels for system, pixels in read.items() if pixels is not None}
    if not pictures:
        return {}
    shared = crop_box(list(pictures.values()))
    first_shape = next(iter(pictures.values())).shape
    prepared = {}
    for system, pixels in pictures.items():
        box = shared if pixels.shape == first_shape else crop_box([pixels])
        y, x, height, width = box
        whole = Image.fromarray(pixels)
        crop = whole.crop((x, y, x + width, y + height))
        # Three quarters of the way by block averages: four times faster, not seen at this size.
        whole.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
        prepared[system] = Prepared(
            pixels.shape[0],
            pixels.shape[1],
            _encoded(whole, "JPEG", quality=_THUMBNAIL_QUALITY, optimize=True),
            _encoded(crop, "WEBP", quality=_CROP_QUALITY, method=4),
            box,
        )
    return prepared


def native_tiles(pixels: ImageArray) -> Iterator[tuple[tuple[int, int, int, int], bytes]]:
    """((y, x, height, width), JPEG with full chroma) of every tile of a picture, row by row.

    Args:
        pixels: uint8 (H, W, 3).
    """
    height, width = pixels.shape[:2]
    for y in range(0, height, TILE_PX):
        for x in range(0, width, TILE_PX):
            tile = pixels[y : y + TILE_PX, x : x + TILE_PX]
            data = _encoded(Image.fromarray(tile), "JPEG", quality=_TILE_QUALITY, subsampling=0)
            yield (y, x, tile.shape[0], tile.shape[1]), data
