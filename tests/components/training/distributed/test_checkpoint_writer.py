from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from components.training.distributed.checkpoint_writer import CheckpointWriter
from components.training.distributed.checkpoints import (
    CheckpointFailed,
    CheckpointStore,
    OpenCheckpoint,
)


def write_word(folder: Path, word: str) -> Callable[[], None]:
    return lambda: (folder / "word").write_text(word) and None


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(store: CheckpointStore, writer: CheckpointWriter, step: int) -> None:
    opened = store.begin(step)
    writer.submit(opened, [write_word(opened.aside, f"step {step}")])


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_submitted_is_committed(tmp_path, in_background):
    store = CheckpointStore(tmp_path, keep=2)
    writer = CheckpointWriter(store, in_background=in_background)
    for step in (1, 2, 3):
        writer.wait()
        save(store, writer, step)
    writer.wait()
    assert store.steps() == [2, 3]
    assert (tmp_path / "step-00000003" / "word").read_text() == "step 3"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    writer = CheckpointWriter(store, in_background=True)
    go_on = threading.Event()
    opened = store.begin(1)
    writer.submit(opened, [lambda: go_on.wait(60), write_word(opened.aside, "late")])
    writer.check()
    assert store.latest() is None
    go_on.set()
    writer.wait()
    assert store.latest() == (1, tmp_path / "step-00000001")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_one_message_and_the_checkpoint_before_stays(tmp_path, in_background):
    store = CheckpointStore(tmp_path, keep=2)
    writer = CheckpointWriter(store, in_background=in_background)
    save(store, writer, 1)
    writer.wait()
    opened = store.begin(2)
    message = "step 2 could not be written .No space left on device.; the checkpoint of step 1"

    def submit_and_wait() -> None:
        writer.submit(opened, [write_word(opened.aside, "half"), full_disk])
        writer.wait()

    with pytest.raises(CheckpointFailed, match=message):
        submit_and_wait()
    writer.check()
    assert store.latest() == (1, tmp_path / "step-00000001")
    save(store, writer, 2)
    writer.wait()
    assert store.steps() == [1, 2]


class TwoRanks:
    """Two stores on one folder, whose collective calls meet at a barrier of threads."""

    def __init__(self, folder: Path) -> None:
        meet = threading.Barrier(2).wait
        self.stores = [
            CheckpointStore(folder, 2, rank=rank, world_size=2, barrier=meet) for rank in (0, 1)
        ]
        self.writers = [CheckpointWriter(store, in_background=True) for store in self.stores]

    def begin(self, step: int) -> list[OpenCheckpoint]:
        opened: dict[int, OpenCheckpoint] = {}

        def open_one(rank: int) -> None:
            opened[rank] = self.stores[rank].begin(step)

        threads = [threading.Thread(target=open_one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [opened[0], opened[1]]


def test_the_first_rank_commits_only_when_the_second_has_written(tmp_path):
    ranks = TwoRanks(tmp_path)
    first, second = ranks.begin(1)
    ranks.writers[0].submit(first, [lambda: (first.aside / "a").write_text("0")])
    written = threading.Event()
    ranks.writers[1].submit(
        second, [lambda: written.wait(60), lambda: (second.aside / "b").write_text("1")]
    )
    assert ranks.stores[0].latest() is None
    written.set()
    for writer in ranks.writers:
        writer.wait()
    assert ranks.stores[0].latest() == (1, tmp_path / "step-00000001")
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert names == {"a", "b", "contents.json"}


def test_a_failure_of_another_rank_reaches_the_first(tmp_path):
    ranks = TwoRanks(tmp_path)
    first, second = ranks.begin(1)
    ranks.writers[1].submit(second, [full_disk])
    ranks.writers[0].submit(first, [lambda: None])
    with pytest.raises(CheckpointFailed, match="rank 1: No space left on device"):
        ranks.writers[0].wait()
    with pytest.raises(CheckpointFailed, match="No space left"):
        ranks.writers[1].wait()
    assert ranks.stores[0].latest() is None


def test_closing_gives_up_a_checkpoint_whose_other_rank_is_gone(tmp_path):
    ranks = TwoRanks(tmp_path)
    first, _ = ranks.begin(1)
    ranks.writers[0].submit(first, [lambda: None])
    ranks.writers[0].close()
    with pytest.raises(CheckpointFailed, match=r"ranks \[1\] had written"):
        ranks.writers[0].check()
