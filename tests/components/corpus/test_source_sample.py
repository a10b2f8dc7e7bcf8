from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from components.corpus.source_sample import copy_sample, count_items
from components.settings.corpus import IngestSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[3]


def settings(**changes: object) -> IngestSettings:
    base = load_settings(ROOT / "params.yaml").ingest
    return base.model_copy(update={"kind": "folder", "source": "photos"} | changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for n in range(20):
        path = tmp_path / "photos" / f"{n % 2}" / f"{n:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % n)
    return tmp_path


def test_a_sample_is_spread_over_the_folder_and_leaves_it_as_it_is(root: Path) -> None:
    source, target = root / "photos", root / "sample"
    lines = [json.dumps({"file": f"{n % 2}/{n:02}.jpg"}) for n in range(20)]
    text = "\n".join([*lines, "{ broken", json.dumps({"file": "nowhere.jpg"}), "7"]) + "\n"
    (source / "captions.jsonl").write_text(text)
    (source / "ATTRIBUTION.csv").write_text("file\n")
    (source / "0" / "00.txt").write_text("beside")
    assert copy_sample(settings(), root, target, 5, "captions.jsonl") == 5
    taken = sorted(str(path.relative_to(target)) for path in target.rglob("*.jpg"))
    assert (taken[0], taken[-1], len(taken)) == ("0/00.jpg", "1/19.jpg", 5)
    assert {name[0] for name in taken} == {"0", "1"}
    assert (target / "0" / "00.txt").read_text() == "beside"
    assert (target / "ATTRIBUTION.csv").is_file()
    left = (target / "captions.jsonl").read_text().splitlines()
    named = [line for line in left if line.startswith('{"file": "0') or '"1/' in line]
    assert sorted(json.loads(line)["file"] for line in named) == taken
    # What is wrong stays, wherever it stands.
    assert [line for line in left if line not in named] == ["{ broken", *text.splitlines()[-2:]]
    assert (source / "captions.jsonl").read_text() == text


def test_what_is_no_regular_file_is_left_out(root: Path) -> None:
    source = root / "photos"
    (source / "dangling.jpg").symlink_to("missing.jpg")
    (root / "outside.jpg").touch()
    (source / "leaves.jpg").symlink_to(root / "outside.jpg")
    (source / "inside.jpg").symlink_to(source / "0" / "00.jpg")
    os.mkfifo(source / "pipe.jpg")
    assert copy_sample(settings(), root, root / "sample", 100, "captions.jsonl") == 21
    assert (root / "sample" / "inside.jpg").read_bytes() == b"0"


def test_items_are_counted_up_to_a_bound(root: Path) -> None:
    assert count_items(settings(), root) == 20
    assert count_items(settings(), root, at_most=7) == 7
    assert count_items(settings(recursive=False), root) == 0
    (root / "list.csv").write_text("url\n" + "https://x.org/a.jpg\n" * 5)
    urls = settings(kind="urls", source="list.csv")
    assert count_items(urls, root) == 5
    assert count_items(urls, root, seconds=-1) is None
    with tarfile.open(root / "a.tar", "w") as archive:
        for path in sorted((root / "photos" / "0").iterdir()):
            archive.add(path, path.name)
    assert count_items(settings(kind="webdataset", source="a.tar"), root) == 10
