"""PIQE against pyiqa where both pad alike, and what it says of known damage."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.metrics.metric import Picture
from components.metrics.native.piqe import piqe
from components.metrics.registry import open_metric


@pytest.fixture(scope="module")
def photographs(root: Path) -> list[np.ndarray]:
    pictures = []
    for file in sorted((root / "data" / "sample").glob("**/*.jpg"))[:3]:
        with Image.open(file) as image:
            pictures.append(np.asarray(image.convert("RGB").resize((320, 208))))
    return pictures


def compressed(rgb: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def reference(rgb: np.ndarray) -> float:
    from pyiqa.archs.piqe_arch import piqe as theirs

    return float(theirs(torch.from_numpy(rgb / 255.0).permute(2, 0, 1)[None])[0])


def test_the_number_is_pyiqas_at_multiples_of_a_block(photographs: list[np.ndarray]) -> None:
    for rgb in photographs:
        for picture in (rgb, compressed(rgb, 10)):
            assert piqe(picture) == pytest.approx(reference(picture), rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_the_number_is_pyiqas_for_noise(seed: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (16 * rows, 16 * columns, 3), dtype=np.uint8)
    assert piqe(rgb) == pytest.approx(reference(rgb), rel=1e-9)


def test_other_sizes_are_mirrored_to_full_blocks(photographs: list[np.ndarray]) -> None:
    rgb = photographs[0][:203, :310]
    whole = np.pad(rgb, ((0, 5), (0, 10), (0, 0)), mode="symmetric")
    assert piqe(rgb) == piqe(whole)


def test_blocks_and_noise_are_damage(photographs: list[np.ndarray]) -> None:
    rgb = photographs[0]
    noise = np.random.default_rng(0).normal(0, 25, rgb.shape)
    noisy = np.clip(rgb + noise, 0, 255).astype(np.uint8)
    before = piqe(rgb)
    assert before is not None
    for damaged in (compressed(rgb, 5), noisy):
        after = piqe(damaged)
        assert after is not None
        assert after > before + 5


def test_a_black_or_tiny_picture_has_no_number_and_a_flat_one_is_all_distorted() -> None:
    assert piqe(np.zeros((64, 64, 3), np.uint8)) is None
    assert piqe(np.full((15, 64, 3), 200, np.uint8)) is None
    # No block is active: (0 + 1) / (0 + 1), as released.
    assert piqe(np.full((64, 64, 3), 200, np.uint8)) == 100.0


def test_the_metric_needs_no_weights(tmp_path: Path, photographs: list[np.ndarray]) -> None:
    picture = Picture(Path("a.png"), "0" * 64)
    found = open_metric("piqe", tmp_path).measure(photographs[0], picture)
    assert found == {"piqe": piqe(photographs[0])}
