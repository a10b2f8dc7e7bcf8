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
import yaml

from flows import versioning
from flows.history.records import all_records

PHOTOS = [
    "blue-wallpaper-portrait-2x3.jpg",
    "jad-limcaco-square.jpg",
    "lower-antelope-canyon.jpg",
    "mount-batok-java.jpg",
    "sean-afnan-5x4.jpg",
    "ng-32703.jpg",
]
SETTINGS = {
    "vae.steps": 12,
    "vae.eval_every": 4,
    "vae.checkpoint_every": 2,
    "vae.batch_size": 2,
    "vae.crop_px": 64,
    "vae.eval_crops": 2,
    "slices.eval_min_images": 1,
    "slices.min_images": 2,
    "dit_stage1.steps": 12,
    "dit_stage1.validate_every": 4,
    "dit_stage1.checkpoint_every": 2,
    "dit_stage2.steps": 6,
    "dit_stage2.validate_every": 2,
    "dit_stage2.checkpoint_every": 2,
    "generate.sizes": [[128, 128], [96, 224]],
    "generate.prompts": 1,
    "generate.num_inference_steps": 4,
    "evaluate.bootstrap_resamples": 100,
}


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
            is_uploader = "flows.tracking" in (process.info["cmdline"] or [])
            if process.cwd() == str(project) and not is_uploader:
                found.append(process)
        except psutil.Error:
            continue
    return found


def running_stage(project: Path, name: str) -> bool:
    return any(record.run.name == name and record.result is None for record in all_records(project))


def start_and_kill(project: Path, stage: str, how: signal.Signals, delay_s: float) -> bool:
    """Start the pipeline, kill it `delay_s` into `stage`; False when it finished before."""
    driver = subprocess.Popen(
        ["ultraflux", "run"],
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    while driver.poll() is None and not running_stage(project, stage):
        time.sleep(0.05)
    deadline = time.monotonic() + delay_s
    while driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if driver.poll() is not None:
        return False
    os.kill(driver.pid, how)
    driver.wait(120)
    waited = time.monotonic() + 30
    while processes_of(project) and time.monotonic() < waited:
        time.sleep(0.1)
    assert processes_of(project) == [], "a stage outlived its pipeline"
    return True


@pytest.mark.slow
def test_kill_in_every_stage_then_run_again_gives_the_same_bytes(
    clone: Callable[..., Path],
) -> None:
    quiet = clone("quiet", SETTINGS, PHOTOS)
    finish(quiet)
    killed = clone("killed", SETTINGS, PHOTOS)
    rng = random.Random(7)
    kills = 0
    for index, stage in enumerate(versioning.stage_graph(killed)):
        how = signal.SIGINT if index % 4 == 3 else signal.SIGKILL
        kills += start_and_kill(killed, stage, how, rng.uniform(0.0, 4.0))
    assert kills >= 10
    finish(killed)
    assert output_hashes(killed) == output_hashes(quiet)


@pytest.mark.slow
def test_dvc_repro_and_the_prefect_flow_give_the_same_bytes_as_the_local_scheduler(
    clone: Callable[..., Path],
) -> None:
    projects = {name: clone(name, SETTINGS, PHOTOS) for name in ("local", "dvc", "prefect")}
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
def test_ctrl_c_under_prefect_stops_the_stage_at_once(clone: Callable[..., Path]) -> None:
    project = clone("ctrl-c", SETTINGS, PHOTOS)
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
