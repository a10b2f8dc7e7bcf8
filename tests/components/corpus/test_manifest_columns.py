"""Columns of a manifest on disk: the values of the whole table, and memory for a batch of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.corpus.manifest import SCHEMA, read_table, write_table
from components.corpus.manifest_columns import (
    CHARACTERS_ZH,
    PRESENT,
    WORDS,
    ManifestOnDisk,
    read_columns,
)
from components.corpus.manifest_copies import copy_manifest
from components.corpus.pages.corpus_diff import VALUES_OF, diff

CAPTIONS = ["a lake", " two\u3000words\x1d ", "", None, "one\x0btwo\u2028three"]
CHINESE = ["湖", "", None, "山水", "𠀀"]


def manifest(count: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)

    def some(*values: object) -> pd.Series:
        return pd.Series([values[n] for n in rng.integers(0, len(values), count)], dtype=object)

    table = pd.DataFrame(
        {
            "image_id": [f"{n:064x}" for n in range(count)],
            "uri": [f"{n}.jpg" for n in range(count)],
            "width": some(3840, None),
            "entropy_bits": rng.uniform(6, 8, count),
            "bucket": some("a", "b", None),
            "license": some("CC0-1.0", None),
            "image_url": some("https://a", None),
            "kept": some(True, False, None),
            "reject_reason": some("entropy", None),
            "caption_en": some(*CAPTIONS),
            "caption_zh": some(*CHINESE),
        }
    )
    return table.reindex(columns=SCHEMA.names)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # More than two row groups.
    place = tmp_path_factory.mktemp("columns") / "manifest.parquet"
    write_table(manifest(40_000), place)
    return place


def same(found: pd.Series, expected: pd.Series) -> None:
    pd.testing.assert_series_equal(
        found.astype(object).where(found.notna(), None),
        expected.astype(object).where(expected.notna(), None),
        check_names=False,
    )


def test_columns_are_those_of_the_whole_table(path: Path) -> None:
    names = ["image_id", "width", "entropy_bits", "bucket", "kept", "reject_reason", "caption_en"]
    found = read_columns(path, [*names, "no_such_column"])
    expected = read_table(path)
    assert list(found) == names
    assert isinstance(found["bucket"].dtype, pd.CategoricalDtype)
    for name in names:
        same(found[name], expected[name])
    kept = read_columns(path, names, kept_only=True)
    expected = expected[expected["kept"].eq(True)].reset_index(drop=True)
    for name in names:
        same(kept[name], expected[name])


def test_a_manifest_without_rows_or_of_an_older_version_has_its_columns(
    tmp_path: Path, path: Path
) -> None:
    empty = tmp_path / "empty.parquet"
    write_table(manifest(0), empty)
    names = ["image_id", "width", "bucket", "kept", WORDS]
    assert list(read_columns(empty, names, kept_only=True)) == names
    table = pq.read_table(path).drop_columns(["license", "width"]).slice(0, 5)
    older = tmp_path / "older.parquet"
    pq.write_table(table, older)
    found = read_columns(older, ["license", "width", "bucket"])
    assert list(found) == ["license", "width", "bucket"]
    assert len(found) == 5
    assert found[["license", "width"]].isna().all(axis=None)
    # Of a file that others have cut no question fails either: nothing is known to be kept.
    pq.write_table(table.drop_columns(["kept", "caption_en"]), older)
    assert read_columns(older, ["width", WORDS])[WORDS].isna().all()
    assert read_columns(older, ["width", WORDS], kept_only=True).empty


def test_words_and_characters_are_those_that_python_counts(path: Path) -> None:
    found = read_columns(path, [WORDS, CHARACTERS_ZH])
    captions = read_table(path, ["caption_en", "caption_zh"]).astype(object)
    words = captions["caption_en"].map(lambda text: len(re.findall(r"\S+", text)), "ignore")
    same(found[WORDS], words)
    same(found[CHARACTERS_ZH], captions["caption_zh"].map(len, "ignore"))


def test_presence_says_where_there_is_a_value(path: Path) -> None:
    names = ["caption_en", "image_url", "license", "width"]
    found = read_columns(path, names, presence=names)
    expected = read_table(path, names)
    for name in names:
        assert (found[name].notna() == expected[name].notna()).all()
    assert set(found["caption_en"].dropna()) == set(found["license"].dropna()) == {PRESENT}
    same(found["width"], expected["width"])


def test_a_version_on_disk_differs_where_its_table_does(tmp_path: Path, path: Path) -> None:
    before, after = read_table(path), manifest(40_000, seed=1)
    after = pd.concat([after.iloc[5:], after.iloc[:3].assign(uri=["x", "y", "z"])])
    changed = tmp_path / "after.parquet"
    write_table(after, changed)
    found = diff(*(ManifestOnDisk(file, VALUES_OF) for file in (path, changed)))
    expected = diff(before, read_table(changed))
    assert found.to_json() == expected.to_json()
    assert min(found.counts()[kind] for kind in ("added", "removed", "caption", "values")) > 0
    for name in expected.rows:
        same(found.rows[name], expected.rows[name])


def test_copies_have_the_bytes_of_the_table_written_at_once(tmp_path: Path, path: Path) -> None:
    table = read_table(path)
    split = pd.Series(["train", None, "eval", "train"] * 10_000, dtype=object)
    rows = np.flatnonzero(split.eq("train"))
    places = {tmp_path / "all.parquet": None, tmp_path / "train.parquet": rows}
    copy_manifest(path, pd.DataFrame({"split": split, "bucket": table["bucket"]}), places)
    table["split"] = split
    for name, expected in (("all", table), ("train", table.iloc[rows])):
        at_once = tmp_path / "at_once.parquet"
        write_table(expected, at_once)
        assert (tmp_path / f"{name}.parquet").read_bytes() == at_once.read_bytes()


@pytest.mark.parametrize("count", [39_999, 40_001, 0])
def test_changed_columns_of_other_rows_are_refused(tmp_path: Path, path: Path, count: int) -> None:
    changed = pd.DataFrame({"split": ["train"] * count})
    with pytest.raises(ValueError, match=rf"(more|fewer) .* {count} changed ones"):
        copy_manifest(path, changed, {tmp_path / "copy.parquet": None})
    assert not (tmp_path / "copy.parquet").exists()


def test_memory_does_not_grow_with_the_captions(tmp_path: Path) -> None:
    table = manifest(100_000).assign(caption_en="photograph" * 120)
    source = tmp_path / "manifest.parquet"
    write_table(table, source)
    script = (
        "import sys; from pathlib import Path; import pandas as pd, pyarrow as pa\n"
        "from components.corpus.manifest_columns import WORDS, read_columns\n"
        "from components.corpus.manifest_copies import copy_manifest\n"
        "source = Path(sys.argv[1])\n"
        "found = read_columns(source, ['entropy_bits', 'bucket', WORDS], presence=['caption_en'])\n"
        "copy_manifest(source, found[['bucket']], {source.with_name('copy.parquet'): None})\n"
        "print(pa.default_memory_pool().max_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source)], capture_output=True, text=True, check=True
    )
    # The captions are 120 MB.
    assert int(done.stdout) < 90e6
