"""The table of a source: everything is listed, everything new is read, nothing twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.corpus.listing import file_content
from components.corpus.listing.file_content import FileToRead, read_content
from components.corpus.listing.known_files import KnownFiles
from components.corpus.listing.source_files import list_source
from components.corpus.listing.source_table import (
    KNOWN_FILES,
    STATE,
    Described,
    describe_source,
    known_table,
)
from components.engine.map_items import EngineLimits
from components.settings.corpus import IngestSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]
LIMITS = EngineLimits(workers=1, timeout_s=60.0, memory_mb=2048, retries=0)


HASHED: dict[str, object] = {"kind": "webdataset"}
"""All files are hashed and no header is looked at, for which no worker has to start."""


def settings(**changes: object) -> IngestSettings:
    values = load_settings(ROOT / "params.yaml").ingest.model_dump()
    values |= {"kind": "folder", "source": "photos", "attribution": None, "max_megapixels": 1.0}
    return IngestSettings.model_validate(values | changes)


def describe(root: Path, **changes: object) -> Described:
    return describe_source(settings(**changes), root / "listing.parquet", root=root, limits=LIMITS)


def rows(root: Path) -> Any:
    return pq.read_table(root / "listing.parquet").to_pandas().set_index("name")


def photograph(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=90)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three photographs and a file of captions; none of them this moment's."""
    for number, name in enumerate(("b.jpg", "deep/a.PNG", "deep/c.jpeg")):
        photograph(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "captions.jsonl").write_text("{}\n")
    return tmp_path


def test_every_file_is_a_row_with_its_bytes_hash_and_header(project: Path) -> None:
    found = describe(project)
    assert found == Described(files=4, candidates=3, read=4, unusable={})
    table = rows(project)
    assert list(table.index) == ["b.jpg", "captions.jsonl", "deep/a.PNG", "deep/c.jpeg"]
    for name, row in table.iterrows():
        data = (project / "photos" / str(name)).read_bytes()
        assert (row["sha256"], row["size_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert table["is_candidate"].tolist() == [True, False, True, True]
    assert table.loc["b.jpg", ["width", "height", "format"]].tolist() == [32, 24, "JPEG"]
    assert pd.isna(table.loc["captions.jsonl", "width"])


def test_another_clone_with_other_times_has_the_same_bytes(project: Path, tmp_path: Path) -> None:
    describe(project)
    other = tmp_path / "other"
    shutil.copytree(project / "photos", other / "photos", copy_function=shutil.copyfile)
    os.utime(other / "photos" / "b.jpg", (1, 1))
    describe(other)
    assert (other / "listing.parquet").read_bytes() == (project / "listing.parquet").read_bytes()


def test_one_more_file_is_one_more_that_is_read(project: Path) -> None:
    describe(project, **HASHED)
    assert describe(project, **HASHED).read == 0
    # It sorts before all others: nothing hangs on positions.
    photograph(project / "photos" / "a.jpg", 9)
    assert describe(project, **HASHED).read == 1
    assert rows(project).index[0] == "a.jpg"
    (project / "photos" / "b.jpg").unlink()
    found = describe(project, **HASHED)
    assert (found.files, found.read) == (4, 0)


def test_a_change_that_keeps_size_and_time_is_seen(project: Path) -> None:
    describe(project, **HASHED)
    before = rows(project)
    path = project / "photos" / "b.jpg"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_table(settings(**HASHED), project) is None
    assert describe(project, **HASHED).read == 1
    after = rows(project)
    assert after.loc["b.jpg", "sha256"] == hashlib.sha256(data).hexdigest()
    assert (after["sha256"] != before["sha256"]).sum() == 1


def test_a_touched_file_is_read_and_the_table_stays(project: Path) -> None:
    describe(project, **HASHED)
    before = (project / "listing.parquet").stat()
    (project / "photos" / "b.jpg").touch()
    assert describe(project, **HASHED).read == 1
    assert (project / "listing.parquet").stat().st_mtime_ns == before.st_mtime_ns


def test_another_bound_reads_photographs_again_and_nothing_else(project: Path) -> None:
    describe(project)
    assert describe(project, max_megapixels=0.0001).read == 3
    assert "limit 0" in rows(project).loc["b.jpg", "integrity"]


def test_a_table_with_equal_rows_in_other_bytes_is_left_alone(project: Path) -> None:
    describe(project, **HASHED)
    path = project / "listing.parquet"
    pq.write_table(pq.read_table(path), path, compression="none")
    other = path.read_bytes()
    describe(project, **HASHED)
    assert path.read_bytes() == other
    path.write_bytes(b"no table")
    describe(project, **HASHED)
    assert len(rows(project)) == 4


def test_what_the_system_left_among_photographs_is_not_looked_at(project: Path) -> None:
    describe(project)
    before = (project / "listing.parquet").read_bytes()
    folders = [".thumbnails", ".git/objects", "@eaDir/b.jpg", "__MACOSX/deep", "deep/#recycle"]
    folders += ["$RECYCLE.BIN", "System Volume Information", "deep/lost+found"]
    for number, name in enumerate([*(f"{one}/x.jpg" for one in folders), "._b.jpg", ".c.jpg"]):
        photograph(project / "photos" / name, 20 + number)
    (project / "photos" / ".DS_Store").write_bytes(b"1")
    assert describe(project) == Described(files=4, candidates=3, read=0, unusable={})
    assert (project / "listing.parquet").read_bytes() == before
    # Only whole names count, and the folder that is the source may have any.
    photograph(project / "photos" / "my@eaDir" / "e.jpg", 40)
    photograph(project / "photos" / ".thumbnails" / "f.jpg", 41)
    assert describe(project).candidates == 4
    assert describe(project, source="photos/.thumbnails").candidates == 2


def test_a_path_that_the_system_refuses_is_one_short_line(project: Path) -> None:
    folder, name = os.open(project / "photos", os.O_RDONLY), "d" * 200
    for _ in range(25):
        os.mkdir(name, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    with pytest.raises(ValueError, match=r"\.\.\..*: File name too long; every folder") as caught:
        describe(project)
    assert len(str(caught.value)) < 400


def test_the_table_that_would_come_is_known_without_opening_a_file(project: Path) -> None:
    assert known_table(settings(**HASHED), project) is None
    describe(project, **HASHED)
    table = hashlib.md5((project / "listing.parquet").read_bytes()).hexdigest()
    assert known_table(settings(**HASHED), project) == table
    for path in (project / "photos").rglob("*.jpg"):
        path.chmod(0o600)
        # Permissions change a time: whether they let us read is seen by reading.
        assert known_table(settings(**HASHED), project) is None
    describe(project, **HASHED)
    assert known_table(settings(**HASHED), project) == table
    assert known_table(settings(source="photos/deep", **HASHED), project) is None
    (project / STATE / "written.json").write_text('{"listed": ')
    assert known_table(settings(**HASHED), project) is None


@pytest.mark.parametrize("damage", [b"no database at all, and long enough to be read as one", b""])
def test_a_damaged_memory_costs_reading_and_nothing_else(project: Path, damage: bytes) -> None:
    describe(project, **HASHED)
    before = (project / "listing.parquet").read_bytes()
    for path in (project / STATE).glob("files.sqlite*"):
        path.unlink()
    (project / KNOWN_FILES).write_bytes(damage)
    assert describe(project, **HASHED).read == 4
    assert (project / "listing.parquet").read_bytes() == before


def test_lists_and_archives_are_listed_alike(project: Path) -> None:
    found = describe(project, kind="urls", source="photos/captions.jsonl")
    assert (found.files, found.candidates, found.read) == (1, 0, 1)
    assert list(rows(project).index) == ["captions.jsonl"]
    # The whole folder, whatever the endings, and no header is looked at.
    found = describe(project, kind="webdataset", recursive=False)
    assert (found.files, found.candidates) == (4, 0)
    assert rows(project)["width"].isna().all()
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder.*ingest\.source"):
        describe(project, kind="urls", source="nowhere")


def test_a_pipe_in_a_files_place_keeps_nobody_waiting(project: Path) -> None:
    path = project / "photos" / "b.jpg"
    path.unlink()
    os.mkfifo(path)
    content = read_content(FileToRead(str(path), 1.0))
    assert (content.sha256, content.columns) == (None, {"integrity": "not a regular file"})
    found = describe(project)
    assert found.unusable == {"not a regular file": 1}
    assert describe(project).read == 0
    assert known_table(settings(), project) is not None


def test_a_file_of_this_moment_is_read_when_a_later_change_shows(tmp_path: Path) -> None:
    path = tmp_path / "new.jpg"
    photograph(path, 1)
    os.utime(path)
    changed = path.stat().st_ctime_ns
    read_content(FileToRead(str(path), 1.0))
    assert time.time_ns() - changed >= 20_000_000


@pytest.mark.parametrize(("changes", "integrity"), [(2, "ok"), (3, "changed while it was read")])
def test_a_file_that_changes_is_read_until_it_rests_three_times_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int, integrity: str
) -> None:
    path = tmp_path / "growing.jpg"
    photograph(path, 1)
    left = iter(range(changes))

    def somebody_writes(_: float) -> None:
        if next(left, None) is not None:
            with path.open("ab") as file:
                file.write(b"more")

    # Every file is one of this moment, and the wait for the clock is when it changes.
    monkeypatch.setattr(file_content, "_CLOCK_STEP_NS", 10**15)
    monkeypatch.setattr(file_content.time, "sleep", somebody_writes)
    content = read_content(FileToRead(str(path), 1.0))
    assert content.columns["integrity"] == integrity
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content.sha256 == (whole if integrity == "ok" else None)
    assert (content.stat is None) == (integrity != "ok")


def test_what_could_not_be_read_is_tried_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that answers with an error leaves no change of the file behind."""
    describe(project)
    path = project / "photos" / "captions.jsonl"
    path.write_text("{ }\n")

    def failing(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("components.corpus.listing.file_content.os.open", failing)
        assert describe(project).unusable == {"cannot read: Input/output error": 1}
    assert known_table(settings(), project) is None
    assert describe(project).unusable == {}
    assert known_table(settings(), project) is not None


KILLED = """\
import sys
from pathlib import Path
from typing import Any
from components.corpus.listing import known_files
from components.corpus.listing.source_table import describe_source
from components.engine.map_items import EngineLimits
from components.settings.corpus import IngestSettings

if __name__ == "__main__":
    # All files would be read before a second commit.
    known_files._COMMIT_EVERY_S = 0.05
    root = Path(sys.argv[1])
    values = IngestSettings.model_validate_json(sys.argv[2])
    limits = EngineLimits(workers=1, timeout_s=60.0, memory_mb=2048, retries=0)
    describe_source(values, root / "listing.parquet", root=root, limits=limits)
"""


def known(root: Path) -> int:
    """Files that the memory below `root` holds."""
    path = root / KNOWN_FILES
    if not path.exists():
        return 0
    with sqlite3.connect(path) as database:
        try:
            return int(database.execute("select count(*) from files").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    photograph(tmp_path / "one.jpg", 1)
    folder = tmp_path / "calm" / "photos"
    folder.mkdir(parents=True)
    data = (tmp_path / "one.jpg").read_bytes()
    for number in range(3000):
        (folder / f"{number:05}.jpg").write_bytes(data + number.to_bytes(4, "big"))
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "photos").symlink_to(folder)
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    values = settings().model_dump_json()
    child = subprocess.Popen([sys.executable, str(script), str(killed), values], cwd=ROOT)
    deadline = time.monotonic() + 120
    while known(killed) < 300 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    done = known(killed)
    assert 300 <= done < 3000
    # A file that comes while nothing runs moves no other one out of what is known.
    (folder / "00000-first.jpg").write_bytes(data)
    assert describe(killed).read == 3001 - done
    describe(tmp_path / "calm")
    tables = [root / "listing.parquet" for root in (tmp_path / "calm", killed)]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_what_is_known_is_of_one_stat_and_one_way_of_reading(tmp_path: Path) -> None:
    photograph(tmp_path / "a.jpg", 1)
    path = str(tmp_path / "a.jpg")
    content = read_content(FileToRead(path, 1.0))
    assert content.stat is not None
    key, stat = os.fsencode(path), content.stat
    with KnownFiles(tmp_path / "files.sqlite", "one way") as files:
        files.put(key, content, is_candidate=True)
        assert files.get(key, stat, is_candidate=True) == content
        assert files.get(key, stat, is_candidate=False) is None
        for index in range(3):
            other = list(stat)
            other[index] += 1
            assert files.get(key, (other[0], other[1], other[2]), is_candidate=True) is None
    with KnownFiles(tmp_path / "files.sqlite", "another way") as files:
        assert files.get(key, stat, is_candidate=True) is None


def reference_names(folder: Path, values: IngestSettings) -> Iterator[str]:
    """Candidates as one thread finds them."""
    for current, folders, names in os.walk(folder):
        here = Path(current)
        folders[:] = [name for name in folders if name[0] != "." and name != "@eaDir"]
        for name in names:
            if name[0] != "." and Path(name).suffix.lower() in values.extensions:
                yield (here / name).relative_to(folder).as_posix()
        if not values.recursive:
            return
        for name in folders:
            if (here / name).is_symlink():
                yield (here / name).relative_to(folder).as_posix()


NAMES = st.sampled_from(
    ["a.jpg", "b.JPG", ".jpg", "..jpg", "c", "d.txt", "e.jpg.txt", " .png", "湖.webp", "x\n.jpg"]
)
TREES = st.lists(
    st.tuples(
        st.sampled_from(["", "one", "two.jpg", "one/three", ".git", "one/@eaDir"]),
        NAMES,
        st.sampled_from("fdl"),
    ),
    min_size=1,
    max_size=12,
)


@given(TREES, st.booleans())
def test_candidates_are_those_that_a_plain_walk_finds(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[str, str, str]], recursive: bool
) -> None:
    root = tmp_path_factory.mktemp("tree")
    folder = root / "photos"
    folder.mkdir()
    (root / "away").mkdir()
    (folder / "always.jpg").touch()
    for where, name, kind in tree:
        path = folder / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if kind == "f":
            path.touch()
        elif kind == "d":
            path.mkdir()
        else:
            path.symlink_to(root / "away")
    values = settings(recursive=recursive)
    found = [file.name for file in list_source(values, root) if file.is_candidate]
    assert found == sorted(reference_names(folder, values))
