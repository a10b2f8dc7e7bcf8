"""The two passes find what the scan of every position finds, and cost a fraction of it."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
import skimage
from skimage import data

from components.corpus.people.faces import Box, find_faces, scan_everywhere
from components.signals.flat_regions import grayscale


def astronaut(edge: int) -> np.ndarray:
    return cv2.resize(data.astronaut(), (edge, edge), interpolation=cv2.INTER_AREA)


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@pytest.mark.parametrize("edge", [512, 448, 384, 320, 256])
def test_the_astronaut_has_one_face_where_it_is(edge: int) -> None:
    pixels = astronaut(edge)
    (face,) = find_faces(pixels)
    row, column = centre(face)
    assert row / edge == pytest.approx(118 / 512, abs=0.03)
    assert column / edge == pytest.approx(223 / 512, abs=0.03)
    ((top, left, bottom, right),) = scan_everywhere(grayscale(pixels))
    assert face == pytest.approx((top, left, bottom, right), abs=0.15 * (bottom - top))


def scenes() -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Faces of 48 to 96 pixels in textures of 256; where each is."""
    rng = np.random.default_rng(0)
    subset = np.load(f"{skimage.__path__[0]}/data/lfw_subset.npy")
    backs = [data.brick(), data.grass(), data.gravel(), data.coins(), data.page()]
    made = []
    for n, face in enumerate(subset[:20]):
        back = backs[n % len(backs)]
        picture = cv2.resize(back, (256, 192), interpolation=cv2.INTER_AREA)
        size = int(rng.choice([48, 64, 96]))
        row, column = int(rng.integers(0, 192 - size)), int(rng.integers(0, 256 - size))
        patch = cv2.resize((face * 255).astype(np.uint8), (size, size))
        picture[row : row + size, column : column + size] = patch
        made.append((np.repeat(picture[..., None], 3, axis=2), (row, column, size)))
    return made


def test_pasted_faces_are_found_as_by_the_scan_of_every_position_for_less() -> None:
    found, everywhere, elsewhere = 0, 0, 0
    spent = [0.0, 0.0]
    for pixels, (row, column, size) in scenes():
        started = time.process_time()
        boxes = find_faces(pixels)
        between = time.process_time()
        every = scan_everywhere(grayscale(pixels))
        spent[0] += between - started
        spent[1] += time.process_time() - between
        inside = [
            row < y < row + size and column < x < column + size
            for y, x in (centre(box) for box in boxes)
        ]
        found += any(inside)
        elsewhere += len(inside) - sum(inside)
        everywhere += bool(every)
    assert everywhere >= 8
    assert found >= 0.85 * everywhere
    assert elsewhere == 0
    # Every scene has a face, which is looked at twice: without one it is a third.
    assert spent[0] < 0.8 * spent[1]


def test_nothing_is_found_where_no_face_fits_or_is() -> None:
    for shape in ((30, 64), (47, 200), (300, 300)):
        assert find_faces(np.zeros((*shape, 3), np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert find_faces(noise) == []
