"""Stages that are forked with their imports done are processes like others, and end like them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from components.settings.schema import load_settings
from flows.experiments.chaos.victims import command_words
from flows.running.stage_forks import STAGE_SOCKET
from flows.running.warm_start import PRELOADS, WarmStart, wanted_modules

# Where a test says so the second stage stays at work until it is told to end.
STAGE = '''\
"""Says what kind of process it is, and copies its input."""

import sys

BEFORE = sorted(sys.modules)

import json, os, time
from pathlib import Path

from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    facts = {
        "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(), "argv": sys.argv,
        "modules": BEFORE, "environment": dict(os.environ), "cwd": os.getcwd(),
        "title": Path("/proc/self/cmdline").read_text().strip("\\0"),
    }
    (context.root / "facts.json").write_text(json.dumps(facts))
    if (context.root / "refuse").exists():
        raise StageFailed("copy1: the input is not what it should be")
    deadline = time.monotonic() + 120
    while (context.root / "wait").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    target = context.root / "data" / "copy1" / "out"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((context.root / "data/ingest/out").read_bytes())
    return StageResult(summary="copied")
'''
RUN = ("ultraflux", "run", "--engine", "local", "--force")


@pytest.fixture(scope="module")
def project(
    trivial_clone: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    clone = trivial_clone(tmp_path_factory.mktemp("warm"), 2)
    (clone / "flows" / "stages" / "copy1.py").write_text(STAGE)
    return clone


@pytest.fixture
def started(project: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the pipeline; whatever is left of it is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        (project / "facts.json").unlink(missing_ok=True)
        running.append(
            subprocess.Popen(
                words or RUN,
                cwd=project,
                env=os.environ | {"PYTHONPATH": str(project)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return running[-1]

    yield start
    for name in ("wait", "refuse"):
        (project / name).unlink(missing_ok=True)
    for process in running:
        if process.poll() is None:
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
            process.kill()
        process.wait()


def facts(project: Path) -> dict[str, object]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            return dict(json.loads((project / "facts.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.05)
    raise AssertionError("the stage did not begin")


def test_only_what_two_stages_need_is_imported_ahead(root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    wanted = wanted_modules(list(stages), cuda=False)
    assert list(wanted) == list(stages)
    assert {module for some in wanted.values() for module in some} == {name for name, _ in PRELOADS}
    assert "great_expectations" in wanted["ingest"]
    assert "torch" not in wanted["ingest"]
    assert "torch" in wanted["vae"]
    assert wanted_modules(["vae"], cuda=False) == {"vae": []}
    two = wanted_modules(["ingest", "vae"], cuda=False)
    assert "pandas" in two["vae"]
    assert not {"great_expectations", "torch"} & {*two["ingest"], *two["vae"]}
    # CUDA cannot be used in a fork of a process that has asked for devices.
    on_gpus = wanted_modules(list(stages), cuda=True)
    assert not {"torch", "deepspeed"} & {m.split(".")[0] for m in on_gpus["dit_stage1"]}
    assert "great_expectations" in on_gpus["ingest"]
    assert "dvc.repo.reproduce" in on_gpus["dit_stage1"]
    for module, needed_by in PRELOADS:
        assert find_spec(module.split(".")[0]) is not None, module
        # Ours are read by each stage anew: an edit while a run goes on must not go unseen.
        assert module.split(".")[0] not in {"components", "flows"}
        assert needed_by is None or needed_by <= set(stages), module


@pytest.mark.slow
def test_imports_ahead_leave_the_compilers_folder_in_the_clone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    clone = tmp_path / "clone"
    clone.mkdir()
    runtime = load_settings(root / "params.yaml").runtime
    warm = WarmStart(clone, ["vae", "dit_stage1"], runtime=runtime)
    try:
        deadline = time.monotonic() + 120
        while not (clone / "runs" / "compiled").is_dir():
            # An import makes it; until it was told where, in the machine's temporary folder.
            assert not list(tmp_path.glob("torchinductor_*"))
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        warm.close()
    assert not list(tmp_path.glob("torchinductor_*"))


@pytest.mark.slow
def test_a_forked_stage_is_a_process_like_that_of_the_command(
    project: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    done = started()
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 0, said
    warm = facts(project)
    assert (project / "data/copy1/out").read_bytes() == (project / "data/ingest/out").read_bytes()
    log = (project / "runs/logs/copy1.log").read_text()
    assert "copy1: copied" in log
    cold = started("dvc", "repro", "-s", "-f", "copy1")
    said = cold.communicate(timeout=120)[0]
    assert cold.returncode == 0, said
    own = facts(project)
    # DVC's shell starts a process by itself below a plain `dvc repro`; a launcher forked the other.
    assert warm["parent"] == warm["group"]
    assert "dvc.commands.repro" in warm["modules"]  # type: ignore[operator]
    assert "dvc.commands.repro" not in own["modules"]  # type: ignore[operator]
    assert warm["argv"] == own["argv"]
    assert warm["cwd"] == own["cwd"]
    shown = str(warm["title"]).split()
    assert shown[-3:] == str(own["title"]).split("\0")[-3:] == ["stage", "run", "copy1"]
    theirs, ours = warm["environment"], own["environment"]
    assert isinstance(theirs, dict)
    assert isinstance(ours, dict)
    assert STAGE_SOCKET not in theirs
    changed = {name for name in theirs | ours if theirs.get(name) != ours.get(name)}
    # What `ultraflux run` tells its stages, and what differs from process to process.
    assert {name for name in changed if not name.startswith("ULTRAFLUX_")} <= {"_", "SHLVL", "PWD"}
    assert theirs["OMP_NUM_THREADS"] == ours["OMP_NUM_THREADS"]


@pytest.mark.slow
def test_a_refusal_in_a_forked_stage_is_told_as_one(
    project: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    (project / "refuse").touch()
    done = started()
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 1
    assert "error: copy1: the input is not what it should be" in said
    # A refusal is not tried again: the exit code came through.
    assert "REFUSED" in said


def kin(pipeline: psutil.Process, stage: int) -> dict[str, psutil.Process]:
    """The processes of a run by what they are."""
    found = {"pipeline": pipeline, "stage": psutil.Process(stage)}
    for process in pipeline.children(recursive=True):
        words = command_words(process)
        line = " ".join(words)
        if "flows.running.warm_start" in words:
            found["warm"] = process
        elif "guarded_process.py" in line:
            found["launcher"] = process
        elif words[-3:] == ["stage", "run", "copy1"] and process.pid != stage:
            found.setdefault("command", process)
        elif "--wait-for-lock" in words:
            found["dvc"] = process
    return found


KILLED = ["warm", "command", "dvc", "launcher", "pipeline", "stage"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", KILLED)
def test_whoever_is_killed_nothing_works_on_that_nobody_waits_for(
    project: Path, started: Callable[..., subprocess.Popen[str]], killed: str
) -> None:
    (project / "wait").touch()
    run = started()
    stage = int(str(facts(project)["pid"]))
    family = kin(psutil.Process(run.pid), stage)
    assert sorted(family) == sorted([*KILLED])
    family[killed].kill()
    if killed == "warm":
        # Everything it has forked goes on, and what comes later starts by itself.
        time.sleep(0.2)
        assert family["stage"].is_running()
    else:
        _, alive = psutil.wait_procs([family["stage"], family["command"]], timeout=30)
        assert alive == []
    (project / "wait").unlink()
    said = run.communicate(timeout=120)[0]
    if killed == "pipeline":
        assert run.returncode == -signal.SIGKILL
    else:
        # The graph allows one retry, which a run without its forks makes too.
        assert run.returncode == 0, said
        assert (project / "data/copy1/out").exists()
    _, alive = psutil.wait_procs(family.values(), timeout=30)
    assert alive == []


def test_a_stop_reaches_a_forked_stage(
    project: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    (project / "wait").touch()
    run = started()
    stage = psutil.Process(int(str(facts(project)["pid"])))
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 130, said
    assert "interrupted" in said
    psutil.wait_procs([stage], timeout=10)
    assert not stage.is_running()
