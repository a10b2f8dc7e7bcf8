"""Files that are wrong in every way we know, through `ultraflux stage run` in a fresh clone.

Every one must end as exactly one row with the right reason or with measures; nothing may crash,
hang or cost a neighbour.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_bytes
import bad_files
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from components.corpus.manifest import read_table
from components.settings.schema import load_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import ingest, signals, source
from flows.stages.contract import StageContext

STAGES = {"source": source, "ingest": ingest, "signals": signals}

PER_KIND = 1
"""Of the 12 of each kind that the slow test and the walkthrough take."""


def make_oddities(photos: Path, outside: Path) -> dict[str, str]:
    """Links, pipes, folders and names; file -> the reason it must have ("ok": none)."""
    rng = np.random.default_rng(99)
    odd = photos / "odd"
    (odd / "folder.jpg").mkdir(parents=True)
    outside.mkdir()
    for path in (odd / "original.jpg", outside / "secret.jpg", odd / "folder.jpg" / "inner.jpg"):
        path.write_bytes(bad_bytes.jpeg(rng))
    for name in ("copy.jpg", "other copy.JPEG"):
        shutil.copy(odd / "original.jpg", odd / name)
    (odd / "link-inside.jpg").symlink_to("original.jpg")
    (odd / "link-outside.jpg").symlink_to(outside / "secret.jpg")
    (odd / "link-folder-outside").symlink_to(outside)
    (odd / "link-folder-up.jpg").symlink_to("..")
    (odd / "dangling.jpg").symlink_to("nowhere.jpg")
    (odd / "loop-a.jpg").symlink_to("loop-b.jpg")
    (odd / "loop-b.jpg").symlink_to("loop-a.jpg")
    (odd / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(odd / "pipe.jpg")
    with (odd / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    for name in ("湖 и café.jpg", "new\nline.jpg", "quote'\".jpg", " .jpg", "a" * 240 + ".jpg"):
        (odd / name).write_bytes(bad_bytes.jpeg(rng))
    (odd / "without-ending").write_bytes(bad_bytes.jpeg(rng))
    (odd / ".jpg").write_bytes(bad_bytes.jpeg(rng))
    Path(os.fsdecode(os.fsencode(odd) + b"/latin-\xe9.jpg")).write_bytes(bad_bytes.jpeg(rng))
    locked = odd / "locked.jpg"
    locked.write_bytes(bad_bytes.jpeg(rng))
    locked.chmod(0)
    return {
        "link-outside.jpg": "leaves the source folder",
        "link-folder-outside": "leaves the source folder",
        "link-folder-up.jpg": "linked folder",
        "dangling.jpg": "cannot read: No such file",
        "loop-a.jpg": "loop",
        "loop-b.jpg": "loop",
        "self.jpg": "loop",
        "pipe.jpg": "not a regular file",
        "sparse.png": "larger than any image",
        "latin-\\xe9.jpg": "not UTF-8",
        "locked.jpg": "ok" if os.access(locked, os.R_OK) else "cannot read: Permission denied",
        **dict.fromkeys(("original.jpg", "copy.jpg", "other copy.JPEG", "link-inside.jpg"), "ok"),
        **dict.fromkeys(("湖 и café.jpg", "new\nline.jpg", "quote'\".jpg", " .jpg"), "ok"),
        "folder.jpg/inner.jpg": "ok",
        "a" * 240 + ".jpg": "ok",
    }


SETTINGS: dict[str, Any] = {
    "ingest.source": "photos",
    "ingest.attribution": None,
    "ingest.max_megapixels": 1.0,
    "ingest.extensions": list(bad_files.EXTENSIONS),
    "signals.timeout_s": 30.0,
    "signals.retries": 0,
    "signals.glcm": False,
    "runtime.workers": 2,
}


def by_command(project: Path) -> None:
    """Run the stages as a person types them; a pipe that is read would wait for ever."""
    for stage in ("code", "source", "ingest", "signals"):
        done = subprocess.run(
            ["ultraflux", "stage", "run", stage], cwd=project, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(project)}, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def outcome(project: Path) -> pd.DataFrame:
    """Manifest of ingest by file, with what signals found beside it (suffix _measured).

    `answer` is what is wrong by the first stage that says so, else "ok".
    """
    manifest = read_table(project / "data" / "ingest" / "manifest.parquet")
    measured = pq.read_table(project / "data" / "signals" / "signals.parquet").to_pandas()
    assert measured["image_id"].is_unique
    table = manifest.merge(measured, "left", "image_id", suffixes=("", "_measured"))
    table.index = pd.Index(table["uri"].str.removeprefix("photos/"))
    found = table["integrity_measured"].fillna(table["error"])
    table["answer"] = table["integrity"].where(table["integrity"] != "ok", found)
    return table


def wrong_answers(table: pd.DataFrame, kinds: dict[str, str]) -> dict[str, str]:
    """What is said of a file, where it is not what stands beside its kind."""
    wrong = {}
    for file, name in kinds.items():
        kind, row = bad_files.KINDS[name], table.loc[file]
        said, note = str(row["answer"]), str(row["decode_note_measured"])
        right = re.fullmatch(kind.answer, said) is not None
        if said == "ok":
            right &= re.search(kind.note, note) is not None
            right &= 0 <= row["entropy_bits_measured"] <= 8
        if not right:
            wrong[f"{name}: {file}"] = f"{said}; {note}"
    return wrong


Case = tuple[Path, pd.DataFrame, dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def case(clone: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = clone("bad", SETTINGS, [])
    kinds = bad_files.make_files(root / "photos", PER_KIND)
    oddities = make_oddities(root / "photos", root.parent / "outside")
    by_command(root)
    return root, outcome(root), kinds, oddities


def test_there_are_more_than_a_hundred_kinds_and_the_oddities(case: Case) -> None:
    _, _, kinds, oddities = case
    assert len(set(kinds.values())) > 100
    assert len(oddities) > 20


@pytest.mark.slow
def test_a_thousand_bad_files_are_a_thousand_rows_with_the_right_reason(
    clone: Callable[..., Path],
) -> None:
    root = clone("thousand", SETTINGS, [])
    kinds = bad_files.make_files(root / "photos")
    assert len(kinds) >= 1000
    by_command(root)
    table = outcome(root)
    assert sorted(table.index) == sorted(kinds)
    assert wrong_answers(table, kinds) == {}
    assert table["error"].isna().all(), "no file needs quarantine"


def test_every_candidate_is_exactly_one_row(case: Case) -> None:
    _, table, kinds, oddities = case
    wanted = sorted([*kinds, *(f"odd/{name}" for name in oddities)])
    assert sorted(table.index) == wanted


def test_every_row_has_a_reason_or_measures(case: Case) -> None:
    _, table, _, _ = case
    rejected = table["integrity"] != "ok"
    assert (table.loc[rejected, "integrity"].str.len() > 10).all()
    assert not table.loc[rejected, "integrity"].str.contains("\n|Traceback|/tmp", regex=True).any()
    assert table.loc[rejected, "entropy_bits_measured"].isna().all()
    accepted = table[~rejected]
    # Where ingest saw a good header there is a row of signals, with measures or with a reason.
    measured = accepted["entropy_bits_measured"].notna()
    reason = accepted["integrity_measured"].fillna(accepted["error"])
    assert (measured | (reason.notna() & (reason != "ok"))).all()
    assert accepted.loc[measured, "entropy_bits_measured"].between(0, 8).all()
    assert table["error"].isna().all(), "no file needs quarantine"


def test_every_file_gets_the_answer_of_its_kind(case: Case) -> None:
    _, table, kinds, _ = case
    assert wrong_answers(table, kinds) == {}


def test_avif_goes_through_the_whole_pass_whatever_its_ending(case: Case) -> None:
    root, table, kinds, _ = case
    for file, kind in kinds.items():
        if kind in ("avif", "avif in disguise"):
            with Image.open(root / "photos" / file) as image:
                size = image.size
            row = table.loc[file]
            assert (row["format"], row["integrity_measured"]) == ("AVIF", "ok")
            assert (row["width"], row["height"]) == size
            assert (row["width_measured"], row["height_measured"]) == size
            assert row["entropy_bits_measured"] > 6
            assert pd.isna(row["jpeg_quality"])


def test_oddities_of_the_file_system_are_named(case: Case) -> None:
    _, table, _, oddities = case
    for name, reason in oddities.items():
        assert reason in table["integrity"][f"odd/{name}"], name
    copies = table.loc[["odd/other copy.JPEG", "odd/original.jpg", "odd/link-inside.jpg"]]
    assert copies["duplicate_of"].notna().sum() == 3
    assert pd.isna(table["duplicate_of"]["odd/copy.jpg"])


def test_sizes_are_upright_and_of_the_first_frame(case: Case) -> None:
    root, table, kinds, _ = case
    for file, kind in kinds.items():
        if kind in ("turned by exif", "animated gif", "animated webp"):
            with Image.open(root / "photos" / file) as image:
                stored, upright = image.size, ImageOps.exif_transpose(image).size
            row = table.loc[file]
            assert (row["width"], row["height"]) == upright
            assert (row["width_measured"], row["height_measured"]) == upright
            assert (row["stored_width"], row["stored_height"]) == stored


@pytest.mark.slow
def test_one_worker_from_a_prompt_gives_the_same_bytes(case: Case) -> None:
    root, _, _, _ = case
    tables = sorted((root / "data").rglob("*.parquet"))
    before = {path: path.read_bytes() for path in tables if path.parts[-2] in STAGES}
    assert len(before) >= len(STAGES)
    settings = load_settings(root / "params.yaml")
    alone = settings.runtime.model_copy(update={"workers": 1})
    settings = settings.model_copy(update={"runtime": alone})
    for name, stage in STAGES.items():
        shutil.rmtree(root / "data" / name)
        state = root / "runs" / "prompt" / name
        stage.run(StageContext(name, settings, root, state, MetricLog(state / "m.jsonl")))
    assert {path: path.read_bytes() for path in before} == before
