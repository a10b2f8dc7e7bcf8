"""What a drill may touch, in which order it does what, and what it does to real processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows.experiments.chaos.faults import (
    DISK_FULL,
    REMOTE_AWAY,
    WEIGHTS,
    Draw,
    bring_back,
    inflict,
    schedule,
    take_away,
)
from flows.experiments.chaos.site import MARK
from flows.experiments.chaos.victims import Victim, kind_of, marked, victims

TOKEN = uuid.uuid4().hex
PYTHON = "/venv/bin/python"


@pytest.mark.parametrize(
    ("words", "kind", "name"),
    [
        ([PYTHON, "/venv/bin/ultraflux", "run", "--no-rehearsal"], "pipeline", "pipeline"),
        ([PYTHON, "/venv/bin/ultraflux", "stage", "run", "vae"], "stage", "stage vae"),
        ([PYTHON, "/venv/bin/dvc", "--wait-for-lock", "repro", "-s", "vae"], "dvc", "dvc vae"),
        (
            [PYTHON, "/x/guarded_process.py", "5", "5.0", "dvc", "--wait-for-lock", "repro"],
            "launcher",
            "launcher",
        ),
        ([PYTHON, "-m", "flows.tracking.uploader", "/x"], "uploader", "uploader"),
        ([PYTHON, "-P", "-m", "flows.running.warm_start", "5", "{}"], "warm start", None),
        ([PYTHON, "-m", "prefect", "server", "start", "--port", "1"], "Prefect server", None),
        (
            [PYTHON, "-m", "prefect", "--no-prompt", "worker", "start", "--pool", "p-cpu"],
            "worker",
            None,
        ),
        ([PYTHON, "-m", "prefect.engine"], "flow run", None),
        ([PYTHON, "-m", "mlflow", "server", "--app-name", "basic-auth"], "MLflow", None),
        (["/usr/lib/postgresql/16/bin/postgres", "-D", "/x", "-p", "1"], "PostgreSQL", None),
        ([PYTHON, "-m", "torch.distributed.run", "--nnodes", "1"], "torchrun", None),
        ([PYTHON, "-u", "-m", "components.training.dit.worker", "job.json"], "rank", None),
        (["/bin/sh", "-c", "ultraflux stage run vae"], None, None),
        (["bash"], None, None),
        ([], None, None),
    ],
)
def test_a_command_line_says_of_what_kind_a_process_is(
    words: list[str], kind: str | None, name: str | None
) -> None:
    found = kind_of(words)
    assert (found[0] if found else None) == kind
    if found and name is not None:
        assert found[1] == name
    assert kind is None or kind in WEIGHTS


@pytest.fixture
def program() -> Iterator[Callable[..., psutil.Process]]:
    """Starts real processes that wait, with or without the mark of the drill."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, mark: str | None = TOKEN, code: str = "") -> psutil.Process:
        env = {k: v for k, v in os.environ.items() if k != MARK}
        env |= {} if mark is None else {MARK: mark}
        text = f"{code}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)"
        command = [sys.executable, "-c", text, *words]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "ready\n"
        return psutil.Process(started[-1].pid)

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def test_only_what_the_drill_has_started_is_its_own(
    program: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    ours = program("stage", "run", "vae")
    theirs = program("stage", "run", "vae", mark=None)
    other = program("stage", "run", "vae", mark="another drill")
    child = (
        "import os, subprocess, sys; e = {k: v for k, v in os.environ.items() if k != %r};"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env=e)"
    )
    # Its children too, whatever they have made of their environment.
    parent = program("x", code=child % MARK)
    (below,) = parent.children()
    found = {process.pid for process in marked(TOKEN, [tmp_path])}
    assert found == {ours.pid, parent.pid, below.pid}
    assert [victim.process.pid for victim in victims(TOKEN, [])] == [ours.pid]
    draw = Draw(0.0, ("rank", "stage"), 0.99, 0.0)
    done = inflict(draw, victims(TOKEN, []), None)
    assert done is not None
    assert done[0] == "stage"
    psutil.wait_procs([ours], timeout=30)
    assert not ours.is_running()
    assert theirs.is_running()
    assert other.is_running()
    assert inflict(draw, victims(TOKEN, []), None) is None


def test_a_full_disk_is_a_limit_of_one_process_and_what_it_starts(
    program: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    place = tmp_path / "file"
    code = (
        "import errno, pathlib, signal\n"
        f"place = pathlib.Path({str(place)!r})\n"
        "def write(*_):\n"
        "    try:\n"
        "        place.write_bytes(b'x' * 9999)\n"
        "    except OSError as problem:\n"
        "        place.with_name('said').write_text(errno.errorcode[problem.errno])\n"
        "signal.signal(signal.SIGUSR1, write)"
    )
    process = program("stage", "run", "vae", code=code)
    done = inflict(Draw(0.0, (DISK_FULL,), 0.0, 0.4), [Victim("stage", "", process)], None)
    assert done is not None
    process.send_signal(10)
    deadline = time.monotonic() + 30
    while not (tmp_path / "said").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.05)
    assert (tmp_path / "said").read_text() == "EFBIG"
    assert place.stat().st_size == 4096
    # This process is no part of it.
    place.write_bytes(b"x" * 9999)


def test_a_remote_goes_away_whole(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "kept").write_text("kept")
    draw = Draw(0.0, (REMOTE_AWAY,), 0.0, 1.0)
    assert inflict(draw, [], None) is None
    done = inflict(draw, [], remote)
    assert done == (REMOTE_AWAY, None, 15.0)
    assert inflict(draw, [], remote) is None
    # As DVC does where it finds no folder.
    with pytest.raises(NotADirectoryError):
        (remote / "files").mkdir(parents=True)
    bring_back(remote)
    assert (remote / "kept").read_text() == "kept"
    bring_back(remote)
    assert [path.name for path in tmp_path.iterdir()] == ["remote"]


def test_what_came_to_a_remote_while_it_went_away_is_kept(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    (remote / "files").mkdir(parents=True)
    (remote / "files" / "old").write_text("old")
    take_away(remote)
    remote.unlink()
    (remote / "files").mkdir(parents=True)
    (remote / "files" / "new").write_text("new")
    bring_back(remote)
    assert {path.name for path in (remote / "files").iterdir()} == {"old", "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["remote"]


def test_the_same_seed_draws_the_same_faults() -> None:
    kinds = list(WEIGHTS)
    first, again, other = (
        list(itertools.islice(schedule(seed, 8.0, kinds), 400)) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert all(sorted(draw.order) == sorted(kinds) for draw in first)
    mean = sum(draw.wait_s for draw in first) / 400
    assert 7.0 < mean < 9.0
    wanted = Counter(draw.order[0] for draw in first)
    # As often as the weights say, within three standard deviations of a draw of 400.
    for kind, weight in WEIGHTS.items():
        share = weight / sum(WEIGHTS.values())
        assert abs(wanted[kind] - 400 * share) < 3 * (400 * share * (1 - share)) ** 0.5 + 1
    with pytest.raises(ValueError, match="choose from"):
        next(schedule(0, 1.0, ["printer"]))
