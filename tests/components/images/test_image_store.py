"""Originals by content address: bytes, versions, interruptions, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpus.image_packing import PackReport, pack_images
from components.corpus.sources.download_journal import DownloadJournal
from components.corpus.sources.records.source_records import SourceRecord
from components.corpus.sources.webdataset import read_webdataset
from components.images.image_store import ImageStore, PackedImage, read_index
from components.images.original_lookup import (
    Original,
    OriginalChanged,
    OriginalLookup,
    OriginalsMissing,
)
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[3]
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def photographs(root: Path, contents: list[bytes]) -> pd.DataFrame:
    """Files under `root`/photos and their rows."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, data in enumerate(contents):
        (root / "photos" / f"{number}.dat").write_bytes(data)
        rows.append({"image_id": hashlib.sha256(data).hexdigest(), "uri": f"photos/{number}.dat"})
    return pd.DataFrame(rows, columns=["image_id", "uri"])


def many(count: int) -> list[bytes]:
    return [(JPEG if n % 2 else PNG) + bytes([n]) * (n * 37 % 2000) for n in range(count)]


def pack(root: Path, rows: pd.DataFrame, digits: int = 1) -> PackReport:
    originals = OriginalLookup(root).find_each(rows)
    return pack_images(originals, root / "data/images", shard_digits=digits)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "data/images").iterdir())}


def test_an_image_that_was_never_packed_is_not_another_one(tmp_path: Path) -> None:
    rows = photographs(tmp_path, many(8))
    pack(tmp_path, rows)
    store = ImageStore(tmp_path / "data/images")
    known = sorted(rows["image_id"])
    for image_id in known:
        found = store.find(image_id)
        assert found is not None
        assert hashlib.sha256(found.read_bytes()).hexdigest() == image_id
        # Beside it in the order of the index.
        for digit in "0f":
            beside = image_id[:-1] + digit
            assert (store.find(beside) is None) == (beside not in known)
    assert store.find("0" * 64) is None
    assert store.find("f" * 64) is None


def test_bytes_that_changed_say_more_than_a_place_that_is_gone(tmp_path: Path) -> None:
    good, other = many(2)
    image_id = hashlib.sha256(good).hexdigest()
    changed, gone = tmp_path / "changed.dat", tmp_path / "gone.dat"
    changed.write_bytes(other)
    for path, shard in ((changed, gone), (gone, changed)):
        original = Original(image_id, path, PackedImage(shard, 0, len(other)))
        assert original.is_there()
        with pytest.raises(OriginalChanged, match="no longer holds these bytes"):
            original.read_bytes()
    with pytest.raises(FileNotFoundError):
        Original(image_id, gone, PackedImage(gone, 0, 1)).read_bytes()


def test_the_store_gives_back_every_byte_when_the_files_are_gone(tmp_path: Path) -> None:
    data = many(40)
    rows = photographs(tmp_path, data)
    report = pack(tmp_path, rows)
    assert (report.images, report.total_bytes) == (40, sum(map(len, data)))
    assert report.unreadable == {}
    for file in (tmp_path / "photos").iterdir():
        file.unlink()
    found = OriginalLookup(tmp_path).find_all(rows)
    assert [original.read_bytes() for original in found] == data


def test_shards_are_plain_tar_files_whose_members_say_nothing_of_their_origin(
    tmp_path: Path,
) -> None:
    data = many(12)
    rows = photographs(tmp_path, data)
    pack(tmp_path, rows)
    by_id = dict(zip(rows["image_id"], data, strict=True))
    seen = []
    for path in sorted((tmp_path / "data/images").glob("*.tar")):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for member in members:
                image_id, ending = member.name.split(".")
                content = archive.extractfile(member)
                assert content is not None
                assert content.read() == by_id[image_id]
                assert ending == ("jpg" if by_id[image_id].startswith(JPEG) else "png")
                assert path.name.startswith(image_id[0] + "-")
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                seen.append(image_id)
            assert [m.name for m in members] == sorted(m.name for m in members)
    assert sorted(seen) == sorted(by_id)
    index = read_index(tmp_path / "data/images")
    assert index["image_id"].tolist() == sorted(by_id)


def test_a_store_can_be_ingested_as_a_webdataset(tmp_path: Path) -> None:
    sample = ROOT / "data" / "sample"
    files = [sample / name for name in ("ng-32703.jpg", "nasa-53884.jpg", "vents-du-sud.jpg")]
    rows = photographs(tmp_path, [file.read_bytes() for file in files])
    pack(tmp_path, rows)
    bounds = load_settings(ROOT / "params.yaml").ingest.download
    bounds = bounds.model_copy(update={"min_pixels": 1})
    with DownloadJournal(tmp_path / "journal.sqlite", "test") as journal:
        records = list(
            read_webdataset(tmp_path / "data/images", "images", tmp_path / "out", journal, bounds)
        )
        places = [record.place for record in records if isinstance(record, SourceRecord)]
        stored = {journal.get(place).result.sha256 for place in places}  # type: ignore
    assert stored == set(rows["image_id"])


def test_adding_or_removing_one_photograph_touches_one_shard(tmp_path: Path) -> None:
    data = many(120)
    rows = photographs(tmp_path, data)
    pack(tmp_path, rows.iloc[:-1])
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data/images").glob("*.tar")}
    report = pack(tmp_path, rows)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data/images").glob("*.tar")}
    assert report.written == 1
    assert len(before.items() - after.items()) == len(after.items() - before.items()) == 1
    assert pack(tmp_path, rows).written == 0
    full = contents(tmp_path)
    assert pack(tmp_path, rows.iloc[:-1]).written == 1
    assert pack(tmp_path, rows).written == 1
    assert contents(tmp_path) == full


@settings(max_examples=20)
@given(
    first=st.sets(st.integers(0, 30)),
    second=st.sets(st.integers(0, 30), min_size=1),
    digits=st.integers(1, 3),
    gone=st.booleans(),
)
def test_the_bytes_of_a_store_do_not_depend_on_what_was_there_before(
    tmp_path_factory: pytest.TempPathFactory,
    first: set[int],
    second: set[int],
    digits: int,
    gone: bool,
) -> None:
    data = many(31)
    fresh, grown = tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("grown")
    rows = photographs(fresh, data)
    photographs(grown, data)
    pack(fresh, rows.iloc[sorted(second)], digits)
    pack(grown, rows.iloc[sorted(first)])
    if gone:
        for number in first:
            (grown / "photos" / f"{number}.dat").unlink()
    assert pack(grown, rows.iloc[sorted(second, reverse=True)], digits).unreadable == {}
    assert contents(grown) == contents(fresh)


def test_a_changed_file_is_not_packed_and_is_named(tmp_path: Path) -> None:
    rows = photographs(tmp_path, many(8))
    (tmp_path / "photos/3.dat").write_bytes(b"another picture")
    (tmp_path / "photos/4.dat").unlink()
    report = pack(tmp_path, rows)
    assert report.images == 6
    assert set(report.unreadable) == {"3.dat", "4.dat"}
    assert "dvc repro ingest" in report.unreadable["3.dat"]


def test_damaged_bytes_are_refused_and_a_healthy_file_is_used_instead(tmp_path: Path) -> None:
    data = many(5)
    rows = photographs(tmp_path, data)
    pack(tmp_path, rows)
    place = ImageStore(tmp_path / "data/images").find(rows["image_id"][4])
    assert place is not None
    with place.shard.open("r+b") as file:
        file.seek(place.offset + 5)
        file.write(b"?")
    original = OriginalLookup(tmp_path).find_all(rows.iloc[4:])[0]
    assert original.read_bytes() == data[4]
    original.path.unlink()
    with pytest.raises(OriginalChanged, match=r"image shard .*dvc checkout data/images"):
        original.read_bytes()
    place.shard.write_bytes(b"")
    with pytest.raises(OriginalChanged):
        original.read_bytes()


def test_a_file_that_changed_since_ingest_is_read_from_the_store(tmp_path: Path) -> None:
    data = many(3)
    rows = photographs(tmp_path, data)
    (original,) = OriginalLookup(tmp_path).find_all(rows.iloc[1:2])
    (tmp_path / "photos/1.dat").write_bytes(b"swapped")
    with pytest.raises(OriginalChanged, match="dvc repro ingest"):
        original.read_bytes()
    photographs(tmp_path, data)
    pack(tmp_path, rows)
    (tmp_path / "photos/1.dat").write_bytes(b"swapped")
    (original,) = OriginalLookup(tmp_path).find_all(rows.iloc[1:2])
    assert original.read_bytes() == data[1]


def test_missing_originals_are_one_line_with_counts_and_the_way_back(tmp_path: Path) -> None:
    rows = photographs(tmp_path, many(6))
    for number in range(5):
        (tmp_path / "photos" / f"{number}.dat").unlink()
    with pytest.raises(OriginalsMissing, match=r"5 of 6 .*0\.dat.*dvc pull data/images") as caught:
        OriginalLookup(tmp_path).find_all(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [("shard", "../../secrets.tar"), ("offset", -1), ("image_id", "x"), ("image_id", "f" * 64)],
)
def test_an_index_from_elsewhere_cannot_lead_outside(
    tmp_path: Path, column: str, value: object
) -> None:
    pack(tmp_path, photographs(tmp_path, many(4)))
    path = tmp_path / "data/images/index.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    values = [value, *table[column].to_pylist()[1:]]
    changed = table.set_column(at, table.schema.field(at), [values])
    pq.write_table(changed, path)
    with pytest.raises(ValueError, match="rows that no store has written"):
        OriginalLookup(tmp_path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a readable index"):
        ImageStore(tmp_path / "data/images")


PACK = """
import sys, pandas, pathlib
from components.corpus.image_packing import pack_images
from components.images.original_lookup import OriginalLookup
root = pathlib.Path(sys.argv[1])
originals = OriginalLookup(root).find_each(pandas.read_csv(root / "rows.csv"))
pack_images(originals, root / "data/images", shard_digits=2)
"""


@pytest.mark.parametrize("after_shards", [1, 40])
def test_a_killed_packing_leaves_the_old_version_and_the_next_run_the_same_bytes(
    tmp_path: Path, after_shards: int
) -> None:
    data = [JPEG + bytes([n]) * 20_000 for n in range(200)]
    rows = photographs(tmp_path, data)
    undisturbed = tmp_path / "undisturbed"
    photographs(undisturbed, data)
    pack(undisturbed, rows, 2)
    pack(tmp_path, rows.iloc[:5], 2)
    old = {path.name for path in (tmp_path / "data/images").iterdir()}
    rows.to_csv(tmp_path / "rows.csv", index=False)
    process = subprocess.Popen([sys.executable, "-c", PACK, str(tmp_path)], cwd=ROOT)
    while process.poll() is None:
        new = {path.name for path in (tmp_path / "data/images").glob("*.tar")} - old
        if len(new) >= after_shards:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    # Whatever happened, the index in place describes files that are there.
    for original in OriginalLookup(tmp_path).find_each(rows.iloc[:5]):
        assert original.packed is not None
        assert hashlib.sha256(original.packed.read_bytes()).hexdigest() == original.image_id
    pack(tmp_path, rows, 2)
    assert contents(tmp_path) == contents(undisturbed)


def test_two_packings_at_once_are_one_clear_error(tmp_path: Path) -> None:
    import fcntl

    rows = photographs(tmp_path, many(3))
    (tmp_path / "data/images").mkdir(parents=True)
    holder = os.open(tmp_path / "data/images", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another packing is at work"):
        pack(tmp_path, rows)
    os.close(holder)
    assert pack(tmp_path, rows).images == 3
