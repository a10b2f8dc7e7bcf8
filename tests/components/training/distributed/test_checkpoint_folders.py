"""What lies in a folder of checkpoints: whole, damaged, out of reach, or not there."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.settings.bad_input import cured_by_no_retry
from components.training.distributed.checkpoint_folders import (
    CONTENTS_FILE,
    LATEST_FILE,
    CheckpointAway,
    CheckpointUnreadable,
    newest_checkpoint,
)
from components.training.distributed.checkpoints import CheckpointStore
from components.training.dit.worker import LASTING

DAMAGES = ("truncated", "missing", "no contents", "bad contents", "another step")


def damage(checkpoint: Path, how: str) -> Path:
    """Damage a checkpoint so that its sizes show it; returns the file at fault."""
    contents = checkpoint / CONTENTS_FILE
    if how == "truncated":
        (checkpoint / "weights.bin").write_bytes(b"half")
        return checkpoint / "weights.bin"
    if how == "missing":
        (checkpoint / "global" / "optimizer.bin").unlink()
        return checkpoint / "global" / "optimizer.bin"
    if how == "no contents":
        contents.unlink()
    elif how == "bad contents":
        contents.write_text("{")
    else:
        contents.write_text(contents.read_text().replace('"step": ', '"step": 7'))
    return contents


def write(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "global").mkdir()
    (folder / "global" / "optimizer.bin").write_bytes(b"moments")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_checkpoint_that_is_not_whole_gives_way_to_the_one_before_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, write)
    file = damage(store.save(2, write), how)
    assert newest_checkpoint(tmp_path) == (1, tmp_path / "step-00000001")
    assert store.latest_intact() == (1, tmp_path / "step-00000001")
    line = f"{file}: damaged, it does not hold what was written; going on from step 1\n"
    assert capsys.readouterr().err == line
    assert store.latest_intact() == (1, tmp_path / "step-00000001")
    store.save(2, write)
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.glob("step-*.1")] == ["step-00000002.1"]
    assert store.latest_intact() == (2, tmp_path / "step-00000002.1")


@pytest.mark.parametrize("how", ["another bit", *DAMAGES])
def test_a_damaged_checkpoint_without_one_before_it_is_refused_and_stays(
    tmp_path: Path, how: str
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    newest = store.save(1, write)
    kept = shutil.copytree(newest, tmp_path / "kept")
    file = newest / "weights.bin"
    if how == "another bit":
        file.write_bytes(b"v" + file.read_bytes()[1:])
    else:
        file = damage(newest, how)
    for _ in range(2):
        with pytest.raises(
            CheckpointUnreadable, match=r"damaged.* no checkpoint before"
        ) as refused:
            store.latest_intact()
        assert str(file) in str(refused.value)
    shutil.rmtree(newest)
    kept.rename(newest)
    assert store.latest_intact() == (1, newest)


@pytest.mark.parametrize(
    ("number", "is_lasting"), [(errno.EACCES, True), (errno.EIO, False), (errno.ESTALE, False)]
)
@pytest.mark.parametrize(
    "place", ["", LATEST_FILE, f"step-00000002/{CONTENTS_FILE}", "step-00000002/weights.bin"]
)
def test_what_cannot_be_reached_just_now_stops_the_run_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_lasting: bool, place: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, write)

    def unreachable(real: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(tmp_path / place)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    for module, name in ((os, "stat"), (os, "listdir"), (io, "open")):
        monkeypatch.setattr(module, name, partial(unreachable, getattr(module, name)))
    kind = CheckpointUnreadable if is_lasting else CheckpointAway
    with pytest.raises(kind, match=f"{os.strerror(number)}.*run again") as refused:
        store.latest_intact()
    monkeypatch.undo()
    # A disk that is away for a moment is what ranks are started again for.
    assert cured_by_no_retry(refused.value) == isinstance(refused.value, LASTING) == is_lasting
    assert str(refused.value).startswith(f"{tmp_path / place}")
    assert store.latest_intact() == (2, tmp_path / "step-00000002")


def test_a_checkpoint_that_a_run_drops_while_it_is_looked_at_gives_the_one_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write)
    stat = os.stat

    def late(*args: Any, **kwargs: Any) -> os.stat_result:
        monkeypatch.undo()
        store.save(2, write)
        return stat(*args, **kwargs)

    monkeypatch.setattr(os, "stat", late)
    assert newest_checkpoint(tmp_path) == (2, tmp_path / "step-00000002")


def test_a_later_checkpoint_that_was_away_when_the_run_went_on_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CheckpointStore(tmp_path / "c", keep=1).save(30, write)
    (tmp_path / "c" / "step-00000030").rename(tmp_path / "away")
    store = CheckpointStore(tmp_path / "c", keep=1)
    assert store.latest_intact() is None
    store.save(10, write)
    (tmp_path / "away").rename(tmp_path / "c" / "step-00000030")
    for step in (15, 20):
        store.save(step, write)
    assert store.steps() == [20, 30]
    assert store.latest() == (20, tmp_path / "c" / "step-00000020")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'c' / 'step-00000030'}: was not there when this run")
    # Who goes on beside it has gone back from it.
    again = CheckpointStore(tmp_path / "c", keep=1)
    assert again.latest_intact() == (20, tmp_path / "c" / "step-00000020")
    again.save(25, write)
    assert store.steps() == [25]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"\0", b"nowhere", b"../.."])
def test_a_damaged_pointer_is_none(tmp_path: Path, content: bytes) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, write)
    (tmp_path / LATEST_FILE).write_bytes(content)
    assert newest_checkpoint(tmp_path) == (1, tmp_path / "step-00000001")
