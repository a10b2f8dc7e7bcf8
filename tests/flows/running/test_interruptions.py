"""Kill the pipeline in the middle of every stage; the results are those of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_project
import yaml

from flows.records.records import all_records
from flows.versioning import graph as versioning


@pytest.fixture
def killable_clone(small_clone: Callable[..., Path]) -> Callable[[str], Path]:
    """Makes small clones in which stages last some seconds."""
    return lambda name: small_clone(name, small_project.LONG_ENOUGH_TO_KILL)


def output_hashes(project: Path) -> dict[str, str]:
    stages: dict[str, Any] = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def finish(project: Path) -> None:
    done = subprocess.run(
        ["ultraflux", "run"], cwd=project, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


def processes_of(project: Path) -> list[psutil.Process]:
    """Everything that works in the project but the uploader, which outlives a killed driver."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            is_uploader = "flows.tracking.uploader" in (process.info["cmdline"] or [])
            if process.cwd() == str(project) and not is_uploader:
                found.append(process)
        except psutil.Error:
            continue
    return found


def running_stage(project: Path, name: str) -> bool:
    return any(record.run.name == name and record.result is None for record in all_records(project))


def seconds_of(project: Path) -> dict[str, float]:
    """What each finished stage took."""
    return {
        record.run.name: (record.result.ended_ms - record.run.started_ms) / 1000
        for record in all_records(project)
        if record.result is not None and record.result.status == "FINISHED"
    }


def start_and_kill(project: Path, stage: str, how: signal.Signals, delay_s: float) -> bool:
    """Start the pipeline, kill it `delay_s` into `stage`, or as soon as that stage has ended.

    False when an earlier round has finished the stage, beside the one it killed.
    """
    if stage in seconds_of(project):
        return False
    driver = subprocess.Popen(
        ["ultraflux", "run"],
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while not running_stage(project, stage) and stage not in seconds_of(project):
        assert driver.poll() is None, f"the pipeline ended before {stage}"
        time.sleep(0.02)
    deadline = time.monotonic() + delay_s
    while time.monotonic() < deadline and running_stage(project, stage):
        time.sleep(0.02)
    if driver.poll() is not None:
        return False  # the last stage was faster
    os.kill(driver.pid, how)
    driver.wait(120)
    waited = time.monotonic() + 30
    while processes_of(project) and time.monotonic() < waited:
        time.sleep(0.1)
    assert processes_of(project) == [], "a stage outlived its pipeline"
    return True


@pytest.mark.slow
def test_kill_in_every_stage_then_run_again_gives_the_same_bytes(
    killable_clone: Callable[[str], Path],
) -> None:
    quiet = killable_clone("quiet")
    finish(quiet)
    killed = killable_clone("killed")
    rng = random.Random(7)
    seconds = seconds_of(quiet)
    kills = 0
    for index, stage in enumerate(versioning.stage_graph(killed)):
        how = signal.SIGINT if index % 4 == 3 else signal.SIGKILL
        kills += start_and_kill(killed, stage, how, rng.uniform(0.0, 0.8) * seconds[stage])
    assert kills >= 10
    finish(killed)
    assert output_hashes(killed) == output_hashes(quiet)


@pytest.mark.slow
def test_dvc_repro_and_the_prefect_flow_give_the_same_bytes_as_the_local_scheduler(
    killable_clone: Callable[[str], Path],
) -> None:
    projects = {name: killable_clone(name) for name in ("local", "dvc", "prefect")}
    finish(projects["local"])
    subprocess.run(["dvc", "repro", "-q"], cwd=projects["dvc"], check=True, timeout=900)
    subprocess.run(
        ["ultraflux", "run", "--engine", "prefect"],
        cwd=projects["prefect"],
        check=True,
        timeout=900,
        stdout=subprocess.DEVNULL,
    )
    expected = output_hashes(projects["local"])
    assert output_hashes(projects["dvc"]) == expected
    assert output_hashes(projects["prefect"]) == expected


@pytest.mark.slow
def test_ctrl_c_under_prefect_stops_the_stage_at_once(
    killable_clone: Callable[[str], Path],
) -> None:
    project = killable_clone("ctrl-c")
    driver = subprocess.Popen(
        ["ultraflux", "run", "--engine", "prefect"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while driver.poll() is None and not running_stage(project, "people"):
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    # Long enough for a loaded machine, far below the minute that a lost server would cost.
    output, errors = driver.communicate(timeout=40)
    assert driver.returncode == 130
    assert errors.splitlines()[-1].startswith("error: interrupted; nothing computed is lost")
    assert "Crash" not in output + errors
