"""Planted pairs: which pictures get a blurred twin, and what is said of a judge that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from components.evaluation.judge.calibration import blurred, failure, planted_pairs
from components.evaluation.judge.judge import Judgement, Pair
from components.evaluation.judge.prompts import Verdict


def verdict(preferred: Literal["A", "B", "tie"]) -> Verdict:
    return Verdict(preferred=preferred, a_score=50.0, b_score=50.0, reasons="clear")


def pair(folder: Path, name: str, prompt: str, *, flat: bool = False) -> Pair:
    rng = np.random.default_rng(int(name))
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if flat:
        pixels[:] = 128
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return Pair(name, prompt, path, folder / "never read.png")


def test_each_prompt_gets_one_twin_of_its_first_picture_with_detail(tmp_path: Path) -> None:
    pairs = [
        pair(tmp_path, "0", "a lake"),
        pair(tmp_path, "1", "a lake"),
        pair(tmp_path, "2", "fog", flat=True),
        pair(tmp_path, "3", "fog"),
        Pair("4", "a hill", tmp_path / "not there.png", tmp_path / "b.png"),
        pair(tmp_path, "5", "a hill"),
        pair(tmp_path, "6", "a road"),
    ]
    folder = tmp_path / "made" / "calibration"
    planted = planted_pairs(pairs, folder, 3)
    assert [one.name for one in planted] == ["planted 0", "planted 3", "planted 5"]
    assert [one.prompt for one in planted] == ["a lake", "fog", "a hill"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{n}_blurred.png" for n in (0, 3, 5)]
    for one in planted:
        original, twin = Image.open(one.a), Image.open(one.b)
        np.testing.assert_array_equal(np.asarray(twin), np.asarray(blurred(original)))
        assert np.asarray(twin).std() < 0.5 * np.asarray(original).std()
    assert len(planted_pairs(pairs, folder)) == 3
    assert planted_pairs(pairs[2:3], folder) == []


def test_the_blur_grows_with_the_picture_and_is_never_too_small_to_see() -> None:
    # The standard deviation of a point's image is the radius: 1/128 of the short edge, at least 2.
    for height, width, radius in ((64, 64, 2.0), (512, 900, 4.0)):
        pixels = np.zeros((height, width), np.uint8)
        pixels[:, width // 2 - 4 : width // 2 + 4] = 255
        seen = np.asarray(blurred(Image.fromarray(pixels))).astype(float)[height // 2]
        at = np.arange(width)
        centre = (seen * at).sum() / seen.sum()
        variance = (seen * (at - centre) ** 2).sum() / seen.sum()
        # A bar 8 wide has a variance of (64 - 1) / 12 itself.
        assert np.sqrt(variance - 63 / 12) == pytest.approx(radius, rel=0.1)


def test_a_judge_that_lets_a_twin_win_is_named_with_its_first_failure(tmp_path: Path) -> None:
    one, other = pair(tmp_path, "0", "a lake"), pair(tmp_path, "1", "a hill")
    right = Judgement("detail", one, verdict("A"), verdict("B"))
    assert right.outcome == "a"
    assert failure([right, right]) == ""
    wrong = Judgement("aesthetics", other, verdict("B"), verdict("A"))
    by_place = Judgement("detail", other, verdict("A"), verdict("A"))
    silent = Judgement("detail", one, None, None, "HTTP 400: no")
    said = failure([right, wrong, by_place])
    assert said.startswith("the judge failed 2 of 3 planted pairs, ")
    assert "(a tie, or by the place, the twin won; first: aesthetics, 1)" in said
    assert "(no answer; first: detail, 0: HTTP 400: no)" in failure([silent])
