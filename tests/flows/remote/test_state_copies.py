"""What a lost clone had saved is where the next one begins, however early the copying ended."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.training.distributed.checkpoints import CheckpointStore
from flows.remote import data_remote, state_copies
from flows.remote.state_copies import StateCopies, kept_copies

STAGE = "b"


class Clone:
    """A clone with the state of one stage, whose inputs are those of every other clone."""

    def __init__(self, root: Path) -> None:
        data_remote.configure(root)
        (root / "data" / "a").write_text("input")
        self.copies = StateCopies(root, STAGE)
        self.root, self.folder = root, self.copies.folder

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", keep=1)

    def train_to(self, step: int) -> None:
        """A checkpoint of two files and a row of metrics per step."""
        rows = "".join(f'{{"step": {number}}}\n' for number in range(step + 1))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text(rows)

        def write(aside: Path) -> None:
            (aside / "engine").mkdir()
            (aside / "engine" / "weights.pt").write_bytes(bytes([step % 256]) * 1000)
            (aside / "trainer.json").write_text(str(step))

        self.checkpoints.save(step, write)

    @property
    def step(self) -> int:
        """Of the newest checkpoint; its files and its metrics are checked."""
        found = self.checkpoints.latest()
        if found is None:
            return -1
        step, folder = found
        assert (folder / "trainer.json").read_text() == str(step)
        assert (folder / "engine" / "weights.pt").read_bytes() == bytes([step % 256]) * 1000
        assert len((self.folder / "metrics.jsonl").read_text().splitlines()) > step
        return step


def clone_of(toy: Path, name: str) -> Clone:
    target = toy.parent / name
    subprocess.run(["git", "clone", "-q", str(toy), str(target)], check=True)
    (target / "data").mkdir()
    return Clone(target)


@pytest.fixture
def another(toy: Path, share: Path) -> Callable[[str], Clone]:
    return partial(clone_of, toy)


def test_another_clone_goes_on_from_the_newest_checkpoint_and_nothing_stays_at_the_end(
    another: Callable[[str], Clone], share: Path
) -> None:
    first, second, third = another("one"), another("two"), another("three")
    assert first.copies.restore() is None
    first.train_to(40)
    first.copies.save()
    first.train_to(80)
    first.copies.save()
    assert second.copies.restore() == "step-00000080"
    assert second.step == 80
    second.train_to(120)
    second.copies.save()
    # The first clone was only thought to be lost.
    first.train_to(90)
    first.copies.save()
    assert third.copies.restore() == "step-00000120"
    assert third.step == 120
    # Only the newest of each clone is kept on the remote.
    (kept,) = kept_copies(third.root)
    assert (kept.stage, kept.stage_key) == (STAGE, third.folder.name)
    assert kept.checkpoint == "step-00000120"
    assert len(list(share.rglob("contents.json"))) == 2
    third.copies.drop()
    assert kept_copies(third.root) == []
    assert not [file for file in share.rglob("*") if file.is_file()]


def test_what_a_clone_has_itself_is_not_replaced_by_less(
    another: Callable[[str], Clone],
) -> None:
    first, second = another("one"), another("two")
    first.train_to(40)
    first.copies.save()
    second.train_to(60)
    assert second.copies.restore() is None
    assert second.step == 60


def test_shards_and_pictures_come_back_and_half_written_files_do_not(
    another: Callable[[str], Clone],
) -> None:
    first, second = another("one"), another("two")
    for name in ("shards/a.parquet", "shards/.b.parquet", "samples/step-1.png", "journal.jsonl"):
        (first.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (first.folder / name).write_text(name)
    first.copies.save()
    second.copies.restore()
    brought = {str(p.relative_to(second.folder)) for p in second.folder.rglob("*") if p.is_file()}
    assert brought == {"shards/a.parquet", "samples/step-1.png"}


def test_copying_that_ends_after_any_file_leaves_a_whole_checkpoint(
    another: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, taker = another("one"), another("two")
    first.train_to(40)
    first.copies.save()
    first.train_to(80)
    put = state_copies._Place.put
    left = 0

    def until(self: Any, file: Path, *parts: str) -> None:
        nonlocal left
        if left == 0:
            raise ConnectionError("gone")
        left -= 1
        put(self, file, *parts)

    monkeypatch.setattr(state_copies._Place, "put", until)
    found = []
    for files in range(6):
        left = files
        with contextlib.suppress(ConnectionError):
            first.copies.save()
        shutil.rmtree(taker.folder, ignore_errors=True)
        taker.copies.restore()
        found.append(taker.step)
    # Three files of the checkpoint, the metrics, and the name that makes it count.
    assert found == [40, 40, 40, 40, 40, 80]


def test_a_checkpoint_that_retention_drops_while_it_is_copied_arrives_whole(
    another: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = another("one"), another("two")
    first.train_to(40)
    put = state_copies._Place.put

    def slow(self: Any, file: Path, *parts: str) -> None:
        if first.step == 40:
            first.train_to(80)
        put(self, file, *parts)

    monkeypatch.setattr(state_copies._Place, "put", slow)
    first.copies.save()
    assert first.checkpoints.steps() == [80]
    assert second.copies.restore() == "step-00000040"
    assert second.step == 40
    assert [path.name for path in first.folder.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_that_arrives_while_it_is_asked_for_is_brought_whole(
    another: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone that was given up, but still runs, sends its next one."""
    first, second = another("one"), another("two")
    first.train_to(40)
    first.copies.save()
    first.train_to(80)
    put, ask = state_copies._Place.put, state_copies._text

    def one_file(self: Any, file: Path, *parts: str) -> None:
        put(self, file, *parts)
        raise ConnectionError("slow")

    monkeypatch.setattr(state_copies._Place, "put", one_file)
    with pytest.raises(ConnectionError):
        first.copies.save()
    monkeypatch.setattr(state_copies._Place, "put", put)

    def late(place: Any, name: str) -> str:
        first.copies.save()
        return ask(place, name)

    monkeypatch.setattr(state_copies, "_text", late)
    assert second.copies.restore() == "step-00000080"
    assert second.step == 80


def test_a_restore_that_is_killed_is_done_again(
    another: Callable[[str], Clone], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = another("one"), another("two")
    first.train_to(40)
    first.copies.save()
    get = state_copies._Place.get
    for files in range(5):
        left = files

        def until(self: Any, name: str, file: Path) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            get(self, name, file)

        monkeypatch.setattr(state_copies._Place, "get", until)
        with pytest.raises(KeyboardInterrupt):
            second.copies.restore()
        monkeypatch.undo()
        monkeypatch.setenv(data_remote.REMOTE, str(first.root.parent / "share"))
    assert second.copies.restore() == "step-00000040"
    assert second.step == 40


def test_a_remote_that_is_away_costs_copies_and_one_line(
    another: Callable[[str], Clone], share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_copies, "PERIOD_S", 0.02)
    first, second = another("one"), another("two")
    away = share.with_name("away")
    said: list[str] = []

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with first.copies.kept_up(said.append):
        share.rename(away)
        share.write_text("in the way")
        first.train_to(40)
        wait_for(lambda: bool(said))
        share.unlink()
        away.rename(share)
        wait_for(lambda: bool(list(share.rglob("latest"))))
    assert len(said) == 1
    assert said[0].startswith("b: state is not copied to the remote: ")
    assert second.copies.restore() == "step-00000040"


def test_copies_of_stages_that_never_finished_are_listed_and_removed(
    another: Callable[[str], Clone],
) -> None:
    first = another("one")
    first.train_to(40)
    first.copies.save()
    command = [sys.executable, "-m", "flows.cli", "remote"]
    listed, dropped, after = (
        subprocess.run(
            [*command, option], cwd=first.root, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for option in ("--state", "--drop-state", "--state")
    )
    assert listed[1].split()[:2] == [f"{STAGE}/{first.folder.name}", "step-00000040"]
    assert dropped[-1] == "removed"
    assert len(after) == 1


@pytest.mark.slow
def test_copies_in_an_object_store_come_back_and_no_key_leads_out_of_the_folder(
    toy: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(data_remote.REMOTE, "s3://corpus/data")
    client = boto3.client("s3", endpoint_url=s3_server.url)
    first, second = clone_of(toy, "one"), clone_of(toy, "two")
    for step in (40, 80):
        first.train_to(step)
        first.copies.save()
    place = f"data/state/{STAGE}/{first.folder.name}"
    for name in ("writer/../../../../evil.parquet", "writer/shards/good.parquet"):
        client.put_object(Bucket="corpus", Key=f"{place}/{name}", Body=b"x")
    assert second.copies.restore() == "step-00000080"
    assert second.step == 80
    brought = [path for path in toy.parent.rglob("*.parquet") if path.is_file()]
    assert brought == [second.folder / "shards" / "good.parquet"]
    second.copies.drop()
    assert kept_copies(second.root) == []
    assert "Contents" not in client.list_objects_v2(Bucket="corpus", Prefix=place)
