"""Suites: local copies read strictly, sizes and seeds, clear errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from components.evaluation.suites.suites import (
    ASPECT_SIZES,
    DEFINITIONS,
    SuiteMissing,
    load_suite,
    runtime_items,
)
from components.metrics.cards import card

NAMES = ("one.jpg", "deep/two.png")


def copy(folder: Path, records: Sequence[Any], names: Sequence[str] = NAMES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(folder / name)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def good(folder: Path) -> Path:
    return copy(
        folder, [{"file_name": n, "text": f"prompt \u2028 of {n}", "more": 1} for n in NAMES]
    )


def test_aesthetic_eval_asks_for_every_prompt_at_4096(tmp_path: Path) -> None:
    good(tmp_path / "data" / "benchmarks" / "aesthetic-eval-4096")
    suite = load_suite("aesthetic-eval-4096", tmp_path)
    assert [item.id for item in suite.items] == ["one", "deep__two"]
    assert {(item.height, item.width) for item in suite.items} == {(4096, 4096)}
    assert suite.items[0].prompt == "prompt \u2028 of one.jpg"
    assert suite.items[0].seed != suite.items[1].seed
    assert load_suite("aesthetic-eval-4096", tmp_path) == suite


def test_the_aspect_suite_has_four_strata_per_prompt(tmp_path: Path) -> None:
    suite = load_suite("aspect-ratio", tmp_path, data=good(tmp_path / "copy"))
    assert {item.stratum for item in suite.items} == {
        "4096x2048",
        "2048x4096",
        "5120x2880",
        "2496x5952",
    }
    assert len({item.id for item in suite.items}) == 8
    assert all(edge % 32 == 0 for size in ASPECT_SIZES for edge in size)
    limited = suite.limited(1)
    assert len(limited.items) == 4
    assert limited.protocol == "aspect-ratio/v1+first1"


def test_a_folder_is_a_suite_at_the_size_of_its_pictures(tmp_path: Path) -> None:
    suite = load_suite(str(good(tmp_path / "mine")), tmp_path)
    assert suite.name == "mine"
    assert {(item.height, item.width) for item in suite.items} == {(48, 64)}


def test_a_copy_is_found_where_the_download_puts_it(tmp_path: Path) -> None:
    benchmarks = tmp_path / "data" / "benchmarks"
    good(benchmarks / "Aesthetic-4K" / "eval" / "size_4096")
    suite = load_suite("aesthetic-eval-4096", tmp_path)
    assert len(suite.items) == 2
    with pytest.raises(SuiteMissing, match=r"--include 'eval/size_2048/\*' --local-dir"):
        load_suite("aesthetic-eval-2048", tmp_path)
    # A copy under our name comes first.
    copy(benchmarks / "aesthetic-eval-4096", [{"file_name": "one.jpg", "text": "ours"}])
    assert [item.prompt for item in load_suite("aesthetic-eval-4096", tmp_path).items] == ["ours"]


def test_a_missing_copy_is_one_line_with_a_command(tmp_path: Path) -> None:
    with pytest.raises(SuiteMissing, match="hf download zhang0jhon/Aesthetic-4K") as caught:
        load_suite("detail", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SuiteMissing, match="ultraflux run"):
        load_suite("held-out", tmp_path)
    with pytest.raises(ValueError, match=r"aesthetic-eval-4096.*runtime"):
        load_suite("aesthetics", tmp_path)


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "deep/../../outside.jpg"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.jpg")
    folder = copy(tmp_path / "copy", [{"file_name": name, "text": "x"}])
    with pytest.raises(ValueError, match=r"line 1: .*leads out"):
        load_suite(str(folder), tmp_path)


def test_pictures_that_are_links_are_read_as_a_hub_cache_lays_them_out(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "4f2a"
    blob.parent.mkdir()
    Image.new("RGB", (8, 16)).save(blob, format="PNG")
    folder = copy(tmp_path / "snapshots" / "main", [{"file_name": "a.png", "text": "x"}])
    (folder / "a.png").symlink_to(Path("..") / ".." / "blobs" / "4f2a")
    (item,) = load_suite(str(folder), tmp_path).items
    assert (item.height, item.width, item.id) == (16, 8, "a")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["{"], "line 1: not JSON"),
        (["[" * 100_000], "line 1: too deeply nested"),
        ([{"file_name": "one.jpg", "text": "a"}, "1" * 5_000], "line 2: a number with too many"),
        ([{"file_name": "one.jpg", "text": "a"}, [1]], "line 2: expected an object"),
        ([{"file_name": "one.jpg", "text": " "}], "line 1: expected"),
        ([{"file_name": "one.jpg", "text": "a"}] * 2, "line 2: .*same name 'one'"),
        ([{"file_name": "three.jpg", "text": "a"}], "1 of 1 pictures .* three.jpg"),
        ([], "names no picture"),
    ],
)
def test_bad_metadata_is_named_by_line(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_suite(str(copy(tmp_path / "copy", records)), tmp_path)


def test_every_metric_of_a_suite_that_has_a_card_is_known() -> None:
    ids = {metric for definition in DEFINITIONS for metric in definition.metrics}
    assert {card(metric).id for metric in ids} == ids


def test_held_out_photographs_are_asked_for_at_their_buckets(tmp_path: Path) -> None:
    table = tmp_path / "data" / "slices" / "eval.parquet"
    table.parent.mkdir(parents=True)
    photo = tmp_path / "photos" / "lake.png"
    photo.parent.mkdir()
    Image.new("RGB", (100, 70)).save(photo)
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    rows = [
        {"image_id": digest, "uri": "photos/lake.png", "bucket_height": 64, "bucket_width": 96},
        {"image_id": "0" * 64, "uri": "photos/gone.png", "bucket_height": 96, "bucket_width": 64},
    ]
    for row in rows:
        row["caption_en"] = f"caption of {row['uri']}"
    pd.DataFrame(rows[:1]).to_parquet(table)
    (item,) = load_suite("held-out", tmp_path).items
    assert (item.id, item.prompt) == (digest, "caption of photos/lake.png")
    assert (item.height, item.width, item.stratum) == (64, 96, "96x64")
    assert item.reference == photo
    pd.DataFrame(rows).to_parquet(table)
    with pytest.raises(ValueError, match=r"1 of 2 originals .*gone.png"):
        load_suite("held-out", tmp_path)


def test_runtime_sizes_are_multiples_of_32() -> None:
    assert all(item.height % 32 == 0 and item.width % 32 == 0 for item in runtime_items())
