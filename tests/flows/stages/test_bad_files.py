"""Hundreds of files that are wrong in every way we know, through ingest and signals.

Every one must end as exactly one row with a reason or with measures; nothing may crash, hang or
cost a neighbour.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import threading
from pathlib import Path

import bad_files
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from components.corpus.manifest import read_table
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import ingest, signals, source
from flows.stages.contract import StageContext

ROOT = Path(__file__).parents[3]


ALWAYS_MEASURED = {
    *("jpeg trailing garbage", "wrong ending", "cmyk", "16 bit", "palette", "1 bit", "alpha"),
    *("gray with alpha", "animated gif", "animated webp", "rotated by exif", "huge exif"),
    *("broken icc", "one pixel", "one line", "avif", "avif in disguise"),
}
NEVER_MEASURED = {
    *("jpeg without size", "jpeg head alone", "empty", "zero bytes", "noise", "text"),
    *("postscript", "png bomb", "png text bomb"),
    *("avif head alone", "jxl of noise", "heif of noise"),
}


def make_oddities(photos: Path, outside: Path) -> dict[str, str]:
    """Links, pipes, folders and names; file -> the reason it must have ("ok": none)."""
    rng = np.random.default_rng(99)
    odd = photos / "odd"
    (odd / "folder.jpg").mkdir(parents=True)
    outside.mkdir()
    for path in (odd / "original.jpg", outside / "secret.jpg", odd / "folder.jpg" / "inner.jpg"):
        path.write_bytes(bad_files.jpeg(rng))
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
        (odd / name).write_bytes(bad_files.jpeg(rng))
    (odd / "without-ending").write_bytes(bad_files.jpeg(rng))
    (odd / ".jpg").write_bytes(bad_files.jpeg(rng))
    Path(os.fsdecode(os.fsencode(odd) + b"/latin-\xe9.jpg")).write_bytes(bad_files.jpeg(rng))
    locked = odd / "locked.jpg"
    locked.write_bytes(bad_files.jpeg(rng))
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


def settings(workers: int) -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {n: str(contracts / f"{n}.yaml") for n in values["validation"]}
    values["ingest"] |= {"source": "photos", "attribution": None, "max_megapixels": 1.0}
    values["ingest"] |= {"extensions": list(bad_files.EXTENSIONS), "kind": "folder"}
    values["signals"] |= {"timeout_s": 30.0, "retries": 0}
    values["runtime"] |= {"workers": workers}
    return parse_settings(values)


def run(root: Path, workers: int) -> pd.DataFrame:
    """Manifest of ingest with the measures of signals beside it (suffix _measured)."""
    for stage in (source, ingest, signals):
        name = stage.__name__.rsplit(".", 1)[-1]
        state = root / "runs" / name
        stage.run(StageContext(name, settings(workers), root, state, MetricLog(state / "m.jsonl")))
    manifest = read_table(root / "data" / "ingest" / "manifest.parquet")
    measured = pq.read_table(root / "data" / "signals" / "signals.parquet").to_pandas()
    assert measured["image_id"].is_unique
    return manifest.merge(measured, "left", "image_id", suffixes=("", "_measured"))


Case = tuple[Path, pd.DataFrame, dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("bad")
    kinds = bad_files.make_files(root / "photos")
    oddities = make_oddities(root / "photos", root / "outside")
    results: list[pd.DataFrame] = []
    # A pipe that is read would wait for ever: say so instead.
    worker = threading.Thread(target=lambda: results.append(run(root, 2)), daemon=True)
    worker.start()
    worker.join(300)
    assert not worker.is_alive(), "a file keeps the stages waiting"
    assert results, "a file broke a stage"
    table = results[0]
    table.index = pd.Index(table["uri"].str.removeprefix("photos/"))
    return root, table, kinds, oddities


def test_there_are_more_than_three_hundred_files_of_more_than_25_kinds(case: Case) -> None:
    _, _, kinds, oddities = case
    assert len(kinds) + len(oddities) > 300
    assert len(set(kinds.values())) >= 25


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


def test_each_kind_ends_as_it_must(case: Case) -> None:
    _, table, kinds, _ = case
    measured = table["entropy_bits_measured"].notna()
    by_kind = measured[list(kinds)].groupby(pd.Series(kinds)).sum()
    assert {
        kind for kind in by_kind.index if by_kind[kind] == bad_files.PER_KIND
    } >= ALWAYS_MEASURED
    assert {kind for kind in by_kind.index if by_kind[kind] == 0} >= NEVER_MEASURED
    # A cut file may be decodable in part, but is never passed off as whole.
    for kind in ("jpeg cut", "jpeg progressive cut", "png cut", "webp cut", "tiff cut", "avif cut"):
        rows = table.loc[[file for file, its_kind in kinds.items() if its_kind == kind]]
        passed = (rows["integrity"] == "ok") & (rows["integrity_measured"] == "ok")
        assert not passed.any(), kind


def test_postscript_is_no_photograph_and_starts_no_interpreter(case: Case) -> None:
    _, table, kinds, _ = case
    rows = table.loc[[file for file, kind in kinds.items() if kind == "postscript"]]
    assert set(rows["integrity"]) == {"not an image that PIL knows"}


@pytest.mark.parametrize(
    ("kind", "family", "package"),
    [("jxl of noise", "JXL", "pillow-jxl-plugin"), ("heif of noise", "HEIF", "pillow-heif")],
)
def test_a_format_without_a_decoder_names_the_missing_package(
    case: Case, kind: str, family: str, package: str
) -> None:
    _, table, kinds, _ = case
    rows = table.loc[[file for file, its_kind in kinds.items() if its_kind == kind]]
    if importlib.util.find_spec(package.replace("-plugin", "").replace("-", "_")) is None:
        reason = f"{family} needs a decoder that is not installed: {package}"
        assert set(rows["integrity"]) == {reason}
    else:
        assert (rows["integrity"] != "ok").all()


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
        if kind in ("rotated by exif", "animated gif", "animated webp"):
            with Image.open(root / "photos" / file) as image:
                stored, upright = image.size, ImageOps.exif_transpose(image).size
            row = table.loc[file]
            assert (row["width"], row["height"]) == upright
            assert (row["width_measured"], row["height_measured"]) == upright
            assert (row["stored_width"], row["stored_height"]) == stored


def test_another_run_with_one_worker_gives_the_same_bytes(case: Case) -> None:
    root, _, _, _ = case

    def digests() -> dict[str, str]:
        return {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((root / "data").rglob("*.parquet"))
        }

    before = digests()
    shutil.rmtree(root / "data")
    shutil.rmtree(root / "runs")
    run(root, 1)
    assert digests() == before
