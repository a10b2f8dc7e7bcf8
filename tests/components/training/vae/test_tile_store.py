"""Stores of tiles: the same bytes however often interrupted, nothing lost without a word."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.engine.ordered_pool import EngineLimits
from components.files.holder_locks import folder_alone
from components.training.vae import tile_store
from components.training.vae.tile_store import (
    NoRoomForTiles,
    NoTiles,
    TooManyUndecodable,
    make_tiles,
    read_tiles,
    tiles_digest,
)
from components.training.vae.tiles import Photograph, TileRules

RULES = TileRules(crop_px=64, tile_px=96, tiles_per_photograph=2, max_megapixels=10.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Photograph]:
    """Twelve of noise; 3 is too narrow, 5 is no picture."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    made = []
    for number in range(12):
        path = folder / f"{number}.png"
        size = (40, 300, 3) if number == 3 else (130 + number, 200, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
        if number == 5:
            path.write_bytes(b"no picture")
        made.append(Photograph(f"id{number:02d}", path))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_rest_is_cut_and_what_is_left_out_is_listed(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    store = make_tiles(photographs, RULES, tmp_path)
    index, rules, left_out = read_tiles(store)
    assert rules["crop_px"] == 64
    assert [(one.name, one.kind) for one in left_out] == [
        ("3.png", "narrow"),
        ("5.png", "undecodable"),
    ]
    whole = pd.read_parquet(store / "index.parquet")
    ids = [one.image_id for one in photographs if one.image_id not in ("id03", "id05")]
    assert list(dict.fromkeys(whole["image_id"])) == ids
    assert list(dict.fromkeys(index["photograph"])) == list(range(10))
    assert not any("journal" in name for name in contents(store))


def test_a_finished_store_needs_no_photograph(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    store = make_tiles(photographs, RULES, tmp_path)
    before = contents(store)
    gone = [Photograph(one.image_id, tmp_path / "gone.png") for one in photographs]
    assert make_tiles(gone, RULES, tmp_path) == store
    assert contents(store) == before


@pytest.mark.parametrize("engine", [False, True])
def test_workers_write_what_this_process_writes(
    photographs: list[Photograph], tmp_path: Path, engine: bool
) -> None:
    here = make_tiles(photographs, RULES, tmp_path / "here", shard_mib=0.1)
    limits = EngineLimits(workers=2, timeout_s=60, memory_mb=1024, retries=0) if engine else None
    there = make_tiles(photographs, RULES, tmp_path / "there", limits=limits, shard_mib=0.1)
    assert contents(here) == contents(there)
    assert sum(name.endswith(".bin") for name in contents(here)) > 2


def test_cutting_that_is_killed_ends_with_the_same_bytes(
    photographs: list[Photograph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_store, "_GROUP_PHOTOGRAPHS", 1)
    undisturbed = make_tiles(photographs, RULES, tmp_path / "a")
    real = tile_store.cut_photograph

    def slowly(*arguments: object, **named: object) -> object:
        time.sleep(0.05)
        return real(*arguments, **named)  # type: ignore[arg-type]

    def work() -> None:
        tile_store.cut_photograph = slowly  # type: ignore[assignment]
        make_tiles(photographs, RULES, tmp_path / "b")

    context = multiprocessing.get_context("fork")
    kills = 0
    # 10 photographs are stored: the first kill comes before the ones left out, the second after.
    for lines in (3, 8):
        child = context.Process(target=work)
        child.start()
        journal = tmp_path / "b" / undisturbed.name / "journal.jsonl"
        while child.is_alive():
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                child.kill()
                kills += 1
                break
            time.sleep(0.002)
        child.join()
        # What a kill in the middle of a write leaves.
        with (journal.parent / "tiles-00000.bin").open("ab") as file:
            file.write(b"half a tile")
    assert kills == 2
    resumed = make_tiles(photographs, RULES, tmp_path / "b")
    assert contents(resumed) == contents(undisturbed)


@pytest.mark.parametrize("at_most", [2, 3, 4, 10, 50])
def test_cutting_stops_when_enough_photographs_have_tiles(
    photographs: list[Photograph], tmp_path: Path, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_tiles(photographs, RULES, tmp_path / "a", at_most=at_most)
    index, _, left_out = read_tiles(store)
    assert index["photograph"].nunique() == min(at_most, 10)
    assert [one.name for one in left_out] == ["3.png", "5.png"][: max(0, min(2, at_most - 3))]
    # Ended after the last tile and before the index.
    monkeypatch.setattr(tile_store._Cutting, "_finish", lambda self: None)
    again = make_tiles(photographs, RULES, tmp_path / "b", at_most=at_most)
    monkeypatch.undo()
    assert not (again / "index.parquet").exists()
    make_tiles(photographs, RULES, tmp_path / "b", at_most=at_most)
    assert contents(again) == contents(store)


def test_the_store_depends_on_photographs_and_rules_and_on_nothing_else(
    photographs: list[Photograph],
) -> None:
    base = tiles_digest(photographs, RULES)
    assert tiles_digest([replace(one, path=Path("x")) for one in photographs], RULES) == base
    changed = [
        tiles_digest(photographs[:-1], RULES),
        tiles_digest(photographs, RULES, at_most=3),
        tiles_digest(photographs, replace(RULES, crop_px=65)),
        tiles_digest(photographs, replace(RULES, tile_px=97)),
        tiles_digest(photographs, replace(RULES, tiles_per_photograph=3)),
        tiles_digest(photographs, replace(RULES, max_megapixels=9.0)),
    ]
    assert len({base, *changed}) == 7


def test_more_undecodable_photographs_than_allowed_end_it_with_the_first_named(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    with pytest.raises(TooManyUndecodable, match=r"1 of 12 .*, 0 may .*5\.png: not an image"):
        make_tiles(photographs, RULES, tmp_path, max_rejected_fraction=0.08)
    make_tiles(photographs, RULES, tmp_path, max_rejected_fraction=0.09)


def test_a_photograph_that_its_worker_does_not_survive_is_left_out(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    # A few kilobytes on the disk, 768 MB as RGB.
    Image.new("1", (16_000, 16_000)).save(tmp_path / "vast.png")
    vast = Photograph("vast", tmp_path / "vast.png")
    rules = replace(RULES, max_megapixels=300.0)
    limits = EngineLimits(workers=1, timeout_s=60.0, memory_mb=512, retries=0)
    store = make_tiles([photographs[0], vast, photographs[1]], rules, tmp_path, limits=limits)
    index, _, left_out = read_tiles(store)
    assert index["photograph"].nunique() == 2
    assert [(one.name, one.kind) for one in left_out] == [("vast.png", "undecodable")]
    assert left_out[0].reason == "quarantined: more than 512 MiB needed"


def test_a_pipe_is_left_out_and_holds_nothing_up(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    pipe = Photograph("pipe", tmp_path / "pipe.jpg")
    _, _, left_out = read_tiles(make_tiles([photographs[0], pipe], RULES, tmp_path))
    assert [(one.name, one.reason) for one in left_out] == [("pipe.jpg", "not a regular file")]


def test_no_photograph_with_room_for_a_crop_is_one_line(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    with pytest.raises(NoTiles, match=r"none of 1 photographs .*64; first 3\.png: 40x300 is"):
        make_tiles(photographs[3:4], RULES, tmp_path)
    with pytest.raises(NoTiles, match="no photographs"):
        make_tiles([], RULES, tmp_path)


def test_a_disk_that_will_be_too_small_is_said_with_the_first_photographs(
    photographs: list[Photograph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_store, "_GROUP_PHOTOGRAPHS", 2)
    usage = shutil.disk_usage(tmp_path)
    two_tiles = 2 * 96 * 96 * 3
    # Ten photographs of two tiles are still to come after the first two, as far as is known then.
    enough = 10 * two_tiles
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough - 1))
    with pytest.raises(NoRoomForTiles, match=r"0\.0 GB of tiles are still to come .*tile_px"):
        make_tiles(photographs, RULES, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    make_tiles(photographs, RULES, tmp_path)


def test_a_full_disk_is_one_line_and_what_is_cut_is_kept(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    def work() -> None:
        tile_store._GROUP_PHOTOGRAPHS = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            make_tiles(photographs, RULES, tmp_path)
        except NoRoomForTiles as problem:
            os._exit(
                0
                if "File too large while cutting tiles; what is cut is kept" in str(problem)
                else 1
            )
        os._exit(2)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    (journal,) = tmp_path.glob("*/journal.jsonl")
    assert journal.read_bytes().count(b"\n") > 2
    store = make_tiles(photographs, RULES, tmp_path)
    assert contents(store) == contents(make_tiles(photographs, RULES, tmp_path / "again"))


def test_a_second_run_does_not_cut_the_same_tiles(
    photographs: list[Photograph], tmp_path: Path
) -> None:
    store = tmp_path / tiles_digest(photographs, RULES)[:16]
    store.mkdir()
    with folder_alone(store, "busy"), pytest.raises(ValueError, match="another run is cutting"):
        make_tiles(photographs, RULES, tmp_path)
