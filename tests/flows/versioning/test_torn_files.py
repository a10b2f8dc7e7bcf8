"""dvc.lock after a kill in the moment in which DVC writes it."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.running.dvc_repro import DvcRunner
from flows.running.graph_walk import walk_graph
from flows.running.leftovers import leftovers
from flows.versioning import graph as versioning
from flows.versioning.torn_files import KEPT_LOCK, TORN_LOCK, mend_after_kills

# DVC's own writing of the file, ended by SIGKILL after some of it has reached the disk.
KILLED = """
import os, signal, sys
from dvc.repo import Repo
from dvc.utils.serialize import _common

def half(data, stream):
    stream.write("schema: '2.0'\\nstages:\\n  a:\\n    cmd: e"[: int(sys.argv[2])])
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)

repo = Repo(sys.argv[1])
with repo.lock:
    _common._dump_data(os.path.join(sys.argv[1], "dvc.lock"), {}, half)
"""


def run(toy: Path) -> dict[Path, int]:
    """Bring everything up to date; when each output was written."""
    graph = versioning.stage_graph(toy)
    stale = versioning.stale_stages(toy, graph)
    runner = DvcRunner(toy, graph, parent_record="x", stale=stale)
    assert all(outcome.ok for outcome in walk_graph(runner, lambda outcome: None).values())
    assert versioning.stale_stages(toy, graph) == {}
    return {path: path.stat().st_mtime_ns for path in (toy / "data").rglob("*") if path.is_file()}


@pytest.mark.parametrize("written", [0, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_while_dvc_saves_costs_no_stage(
    toy: Path, written: int, capfd: pytest.CaptureFixture[str]
) -> None:
    made = run(toy)
    whole = (toy / "dvc.lock").read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(toy), str(written)])
    assert killed.returncode == -signal.SIGKILL
    assert (toy / "dvc.lock").stat().st_size == written
    capfd.readouterr()
    assert run(toy) == made
    assert (toy / "dvc.lock").read_bytes() == whole
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dvc.lock was cut off by a kill; it is again as it was before")
    assert (TORN_LOCK in line) == (toy / TORN_LOCK).exists() == bool(written)
    assert (TORN_LOCK in [one.path for one in leftovers(toy)]) == bool(written)


def test_what_only_reads_the_file_mends_it_too(toy: Path) -> None:
    run(toy)
    whole = versioning.read_lock(toy)
    lock = toy / "dvc.lock"
    lock.write_bytes(lock.read_bytes()[:40])
    assert versioning.read_lock(toy) == whole
    text = lock.read_text().replace("stages:", "<<<<<<< ours\nstages:")
    lock.write_text(text)
    with pytest.raises(versioning.GraphError, match=r"^dvc\.lock cannot be read at line \d; mend"):
        versioning.read_lock(toy)
    # Where DVC meets it first, too.
    met = pytest.raises(versioning.GraphError, match=r"^dvc\.lock cannot be read at line \d; mend")
    with met, versioning.open_repo(toy) as repo:
        repo.status()
    # A merge is a person's work.
    assert lock.read_text() == text


def test_a_kill_in_the_first_saving_leaves_a_clone_that_runs(toy: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(toy), "0"])
    assert (toy / "dvc.lock").read_bytes() == b""
    assert run(toy)


def test_the_copy_follows_what_people_do_with_the_file(toy: Path) -> None:
    run(toy)
    lock = toy / "dvc.lock"
    lock.write_text("schema: '2.0'\n")
    mend_after_kills(toy)
    assert (toy / KEPT_LOCK).read_text() == "schema: '2.0'\n"
    lock.unlink()
    mend_after_kills(toy)
    assert not (toy / KEPT_LOCK).exists()
    assert not lock.exists()


def test_a_file_that_is_being_written_is_waited_for_and_not_replaced(toy: Path) -> None:
    run(toy)
    lock = toy / "dvc.lock"
    whole = lock.read_bytes()
    with (toy / ".dvc" / "tmp" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.write_bytes(whole[:40])
        finished = threading.Timer(0.4, lambda: lock.write_bytes(whole + b"# saved\n"))
        finished.start()
        mend_after_kills(toy)
        assert lock.read_bytes() == whole + b"# saved\n"
        assert (toy / KEPT_LOCK).read_bytes() == whole
        finished.join()
    mend_after_kills(toy)
    assert (toy / KEPT_LOCK).read_bytes() == whole + b"# saved\n"


def test_a_folder_that_cannot_be_written_keeps_no_copy(toy: Path) -> None:
    (toy / "dvc.lock").write_text("schema: '2.0'\n")
    (toy / ".dvc" / "tmp" / "lock").touch()
    (toy / KEPT_LOCK).mkdir()
    mend_after_kills(toy)
    assert (toy / "dvc.lock").read_text() == "schema: '2.0'\n"
