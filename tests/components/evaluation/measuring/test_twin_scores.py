"""A picture is recognised when no other photograph is as near: known errors, known neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from components.evaluation.measuring.twin_scores import (
    Twin,
    reduced_psnr_db,
    score_twins,
    twin_metrics,
)


def plain(value: int, size: tuple[int, int] = (64, 32)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_the_error_of_two_plain_pictures_is_known() -> None:
    assert reduced_psnr_db(plain(100), plain(110)) == pytest.approx(20 * math.log10(255 / 10))
    assert reduced_psnr_db(plain(7), plain(7)) == math.inf
    with pytest.raises(ValueError, match="one size"):
        reduced_psnr_db(plain(0), plain(0, (32, 64)))


def test_detail_within_a_block_of_eight_does_not_count() -> None:
    stripes = np.zeros((32, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert reduced_psnr_db(Image.fromarray(stripes), plain(100)) == math.inf
    # A block further apart they do.
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, :8] = 200
    assert reduced_psnr_db(Image.fromarray(halves), plain(0)) == pytest.approx(
        10 * math.log10(255**2 / (200**2 / 8))
    )


def test_a_twin_is_recognised_by_its_own_photograph_alone() -> None:
    photographs = {"dark": plain(50, (640, 320)), "light": plain(200, (320, 640))}
    near = {"dark": ("a.png", plain(60)), "light": ("b.png", plain(190))}
    assert [(one.file, one.is_nearest) for one in score_twins(near, photographs)] == [
        ("a.png", True),
        ("b.png", True),
    ]
    crossed = {"dark": ("a.png", plain(190)), "light": ("b.png", plain(60))}
    assert [one.is_nearest for one in score_twins(crossed, photographs)] == [False, False]
    # As near to another as to its own is not recognised.
    (between,) = score_twins({"dark": ("c.png", plain(125))}, photographs)
    assert not between.is_nearest
    assert between.psnr_db == pytest.approx(20 * math.log10(255 / 75))


def test_headline_numbers() -> None:
    twins = [Twin("a", "a.png", 20.0, True), Twin("b", "b.png", 18.0, False)]
    assert twin_metrics(twins) == {
        "twins": 2.0,
        "twins_recognised": 1.0,
        "twin_psnr_db_worst": 18.0,
        "twin_psnr_db_mean": 19.0,
    }
    assert twin_metrics([]) == {}
