"""What a judge gets to see of two pictures: the whole, and the same crops at native pixels.

A model that scales 4096 x 4096 down to a thousand pixels cannot judge fine detail, so the most
detailed places are shown as they are. Places are the same in both pictures, chosen by the detail of
both together: neither is shown at its best.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from components.images.arrays import ImageArray
from components.signals.flat_regions import grayscale, sobel_variance

WHOLE_PX = 1024
CROP_PX = 512
CROPS = 2
_JPEG_QUALITY = 95
EXHIBITS_VERSION = f"whole{WHOLE_PX}-crops{CROPS}x{CROP_PX}-q{_JPEG_QUALITY}/v1"
"""Part of the request cache's key."""


def detailed_places(first: ImageArray, second: ImageArray) -> list[tuple[int, int]]:
    """Top left corners (y, x) of the tiles with most detail, most first.

    Detail is the variance of the Sobel magnitude, each picture's share of its own total, so that a
    noisier picture does not choose alone. Ties go to the tile nearer to the top left.

    Args:
        first: uint8 (H, W, 3).
        second: uint8 of the same shape.

    Returns:
        At most `CROPS` corners; none where the picture is not larger than a crop.
    """
    height, width = first.shape[:2]
    if height <= CROP_PX or width <= CROP_PX:
        return []
    corners = [
        (y, x)
        for y in range(0, height - CROP_PX + 1, CROP_PX)
        for x in range(0, width - CROP_PX + 1, CROP_PX)
    ]
    shares = np.zeros(len(corners))
    for picture in (first, second):
        gray = grayscale(picture)
        detail = np.array(
            [sobel_variance(gray[y : y + CROP_PX, x : x + CROP_PX]) for y, x in corners]
        )
        shares += detail / max(float(detail.sum()), 1e-12)
    order = np.argsort(-shares, kind="stable")
    return [corners[index] for index in order[:CROPS]]


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def exhibits(first: ImageArray, second: ImageArray) -> tuple[tuple[str, bytes], ...]:
    """(caption, JPEG) of everything shown, the first picture as A.

    Args:
        first: uint8 (H, W, 3).
        second: uint8 of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"pictures of {first.shape[:2]} and {second.shape[:2]} (height, width): a judge needs "
            "both at one size"
        )
    places = detailed_places(first, second)
    shown: list[tuple[str, bytes]] = []
    for name, pixels in (("A", first), ("B", second)):
        picture = Image.fromarray(pixels)
        whole = picture.copy()
        whole.thumbnail((WHOLE_PX, WHOLE_PX), Image.Resampling.LANCZOS)
        shown.append((f"Image {name}, whole:", _jpeg(whole)))
        for number, (y, x) in enumerate(places, start=1):
            crop = picture.crop((x, y, x + CROP_PX, y + CROP_PX))
            shown.append((f"Image {name}, crop {number}:", _jpeg(crop)))
    return tuple(shown)
