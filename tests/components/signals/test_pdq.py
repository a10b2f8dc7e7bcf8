from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pdqhash
import pytest
from PIL import Image

from components.images.decoding import read_rgb
from components.signals.flat_regions import grayscale
from components.signals.pdq import pdq

SAMPLE = Path(__file__).parents[3] / "data" / "sample"
NAMES = ["galen-crout-175291.jpg", "ng-32703.jpg", "jad-limcaco-square.jpg"]


def photo(name: str) -> np.ndarray:
    return read_rgb(SAMPLE / name).pixels


def bits(hexadecimal: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(hexadecimal), np.uint8))


def distance(first: str, second: str) -> int:
    return int((bits(first) != bits(second)).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_is_that_of_the_colour_image_within_a_few_bits(name: str) -> None:
    pixels = photo(name)
    image = Image.fromarray(pixels)
    image.thumbnail((512, 512), Image.Resampling.BOX, reducing_gap=None)
    expected, expected_quality = pdqhash.compute(np.asarray(image))
    found = pdq(grayscale(pixels))
    assert found is not None
    assert len(found[0]) == 64
    assert int((bits(found[0]) != expected).sum()) <= 8
    assert abs(found[1] - expected_quality) <= 2


def reference(gray: np.ndarray) -> tuple[str, int]:
    """What Meta's implementation says of an image that it does not shrink."""
    found, quality = pdqhash.compute(np.repeat(gray[..., None], 3, axis=2))
    return np.packbits(found.astype(np.uint8)).tobytes().hex(), int(quality)


@pytest.mark.parametrize(
    "shape", [(64, 64), (64, 65), (127, 128), (128, 129), (342, 512), (512, 342), (193, 511)]
)
def test_every_bit_and_every_quality_are_those_of_the_reference(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    gray = grayscale(photo(NAMES[0]))
    pieces = [cv2.resize(gray, shape[::-1], interpolation=cv2.INTER_AREA)]
    pieces += [rng.integers(0, 256, shape, dtype=np.uint8), np.zeros(shape, np.uint8)]
    # A blank image hashes the rounding of its sums: another order is another hash.
    pieces += [np.full(shape, level, np.uint8) for level in range(1, 256, 17)]
    for _ in range(20):
        top, left = (
            rng.integers(0, edge - side) for edge, side in zip(gray.shape, shape, strict=True)
        )
        pieces.append(np.ascontiguousarray(gray[top : top + shape[0], left : left + shape[1]]))
    assert [pdq(piece) for piece in pieces] == [reference(piece) for piece in pieces]


def test_a_smaller_recompressed_copy_is_near_and_another_photograph_is_far() -> None:
    image = Image.fromarray(photo(NAMES[0]))
    buffer = io.BytesIO()
    image.resize((1100, 620), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=60)
    copy = pdq(grayscale(np.asarray(Image.open(buffer))))
    original = pdq(grayscale(np.asarray(image)))
    other = pdq(grayscale(photo(NAMES[1])))
    assert copy is not None
    assert original is not None
    assert other is not None
    assert distance(copy[0], original[0]) <= 16
    assert distance(other[0], original[0]) > 90


def test_a_blank_image_has_no_quality() -> None:
    found = pdq(np.full((600, 900), 200, np.uint8))
    assert found is not None
    assert found[1] == 0


@pytest.mark.parametrize(
    ("shape", "is_hashed"),
    [((63, 4000), False), ((64, 64), True), ((64, 6000), True), ((9000, 70), True)],
)
def test_edges_below_64_pixels_have_no_hash(shape: tuple[int, int], is_hashed: bool) -> None:
    gray = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (pdq(gray) is not None) is is_hashed
