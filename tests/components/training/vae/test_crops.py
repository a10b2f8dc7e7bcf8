"""Crops: a pure function of seed, step and index, at any number of photographs and open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.images.pixel_range import to_pixels
from components.training.vae.crops import (
    Photograph,
    TileCrops,
    TilesDamaged,
    WorkingCopies,
)

CROP_PX, TILE_PX = 64, 96
SIZES = ((150, 260), (300, 110), (70, 400), (96, 96), (1100, 700))
SEED = 7


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Photograph]:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [Photograph(f"id{n}", folder / f"{n}.png") for n in range(len(SIZES))]


@pytest.fixture(scope="module")
def copies(
    photographs: list[Photograph], tmp_path_factory: pytest.TempPathFactory
) -> WorkingCopies:
    folder = tmp_path_factory.mktemp("tiles")
    # One or two tiles a shard.
    return WorkingCopies(photographs, CROP_PX, folder, tile_px=TILE_PX, shard_mib=0.06)


def test_crops_are_a_pure_function_of_seed_step_and_index(copies: WorkingCopies) -> None:
    crops = [copies.crop_at(1, step, index) for step in range(40) for index in range(8)]
    again = [copies.crop_at(1, step, index) for step in range(40) for index in range(8)]
    assert crops == again
    assert crops != [copies.crop_at(2, step, index) for step in range(40) for index in range(8)]
    assert {crop.photograph for crop in crops} == set(range(5))
    assert {crop.tile for crop in crops} == set(range(len(copies.tiles_of(0)) + 7))
    assert {crop.flip for crop in crops} == {True, False}
    # Corners from the first row and column to the last that holds a crop.
    assert {crop.top for crop in crops} == set(range(TILE_PX - CROP_PX + 1))
    assert len(set(crops)) > 250


def test_a_crop_is_that_region_of_the_whole_photograph(
    copies: WorkingCopies, photographs: list[Photograph]
) -> None:
    """The slow reference: the photograph as a whole, reduced as the rules say."""
    index = pd.read_parquet(copies.store / "index.parquet")
    batch = to_pixels(copies.batch(SEED, 3, range(60)))
    for number, pixels in enumerate(batch):
        crop = copies.crop_at(SEED, 3, number)
        image = Image.open(photographs[crop.photograph].path)
        if crop.photograph == 4:
            image = image.resize((652, 1024), Image.Resampling.LANCZOS)
        place = index.loc[crop.tile]
        assert place["image_id"] == photographs[crop.photograph].image_id
        top, left = place["top"] + crop.top, place["left"] + crop.left
        expected = np.asarray(image)[top : top + CROP_PX, left : left + CROP_PX]
        assert np.array_equal(pixels, expected[:, ::-1] if crop.flip else expected)
        assert np.array_equal(copies.cut(crop), pixels)


def test_tiles_are_read_in_parts_without_a_change(
    copies: WorkingCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copies.batch(SEED, 0, range(30))
    monkeypatch.setattr("components.training.vae.crops._BUFFER_BYTES", 2 * TILE_PX**2 * 3)
    assert torch.equal(copies.batch(SEED, 0, range(30)), whole)


def test_a_rank_sees_its_part_of_the_global_batch(copies: WorkingCopies) -> None:
    whole = copies.batch(SEED, 5, range(8))
    # Each rank opens the store for itself.
    ranks = [TileCrops(copies.store).batch(SEED, 5, range(at, at + 2)) for at in range(0, 8, 2)]
    assert torch.equal(torch.cat(ranks), whole)
    assert whole.dtype == torch.float32
    assert -1.0 <= float(whole.min()) < float(whole.max()) <= 1.0


def test_held_out_crops_take_photographs_in_turn_and_never_turn_them(
    copies: WorkingCopies,
) -> None:
    crops = [copies.held_out_crop(SEED, index) for index in range(20)]
    assert [crop.photograph for crop in crops] == [*range(5)] * 4
    assert not any(crop.flip for crop in crops)
    held_out = copies.held_out(SEED, 20)
    assert all(np.array_equal(copies.cut(crop), held_out[n]) for n, crop in enumerate(crops))


def test_tiles_of_a_photograph_are_read_when_they_are_asked_for(
    copies: WorkingCopies, photographs: list[Photograph]
) -> None:
    assert len(copies.arrays) == len(copies) == 5
    assert [[tile.shape for tile in tiles] for tiles in copies.arrays] == [
        [(96, 96, 3)] * 2,
        [(96, 96, 3)] * 2,
        [(70, 96, 3)] * 2,
        [(96, 96, 3)],
        [(96, 96, 3)] * 2,
    ]
    assert np.array_equal(copies.arrays[3][0], np.asarray(Image.open(photographs[3].path)))


def test_a_damaged_tile_is_named_with_what_to_do(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    copies = WorkingCopies(photographs[3:4], CROP_PX, tmp_path, tile_px=TILE_PX)
    shard = copies.store / "tiles-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TilesDamaged, match=r"tiles-00000\.bin: .* delete this folder"):
        copies.batch(SEED, 0, range(1))


_MANY = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from pathlib import Path
from components.training.vae.crops import Photograph, WorkingCopies
picture, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
photographs = [Photograph(f"{n:064x}", picture) for n in range(count)]
copies = WorkingCopies(photographs, 64, folder, tile_px=64, shard_mib=0.024)
shards = len(list(copies.store.glob("*.bin")))
batch = copies.batch(0, 0, range(2 * count))
mapped = Path("/proc/self/maps").read_text().count(".bin")
print(len(copies.arrays), shards, tuple(batch.shape), len(os.listdir("/proc/self/fd")), mapped)
"""


def test_more_photographs_and_shards_than_a_process_may_open(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [sys.executable, "-c", _MANY, str(tmp_path / "a.png"), str(tmp_path / "t"), "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = done.stdout.replace("(", "").replace(")", "").replace(",", "").split()
    assert numbers[:6] == ["120", "60", "240", "3", "64", "64"]
    assert int(numbers[6]) < 30
    assert numbers[7] == "0"
