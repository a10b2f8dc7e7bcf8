"""`ultraflux stage run vae` over a slice with photographs that hold no crop."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.corpus.manifest import write_table
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint

SETTINGS = {
    "vae.steps": 2,
    "vae.eval_every": 2,
    "vae.checkpoint_every": 2,
    "vae.batch_size": 2,
    "vae.micro_batch_size": 2,
    "vae.crop_px": 64,
    "vae.eval_crops": 1,
    "models.autoencoder.tiny.block_out_channels": [8, 8, 16, 16],
    "models.autoencoder.tiny.norm_num_groups": 4,
    "runtime.workers": 1,
}
# Narrow as it is, and narrow once a long edge of 16 crops is made of it.
PHOTOGRAPHS = {"a": (120, 160), "b": (90, 90), "strip": (50, 400), "panorama": (100, 2048)}


@pytest.mark.slow
def test_a_panorama_is_left_out_and_counted_and_the_others_train(
    clone: Callable[..., Path],
) -> None:
    project = clone("panorama", SETTINGS, [])
    narrow = sliced(project)
    stage(project, "code")
    said = stage(project, "vae")
    assert "left out: 2 too narrow for a crop (left_out.csv)" in said
    metrics = json.loads((project / "data" / "vae" / "metrics.json").read_text())
    assert (metrics["left_out_narrow"], metrics["left_out_undecodable"]) == (2, 0)
    lost = pd.read_csv(project / "data" / "vae" / "left_out.csv").set_index("image_id")
    assert set(lost.index) == {narrow["strip"], narrow["panorama"]}
    assert "100x2048 is 50x1024" in " ".join(map(str, lost.loc[narrow["panorama"]]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_ends_the_stage_with_the_code_of_an_interruption_and_no_step_lost(
    clone: Callable[..., Path], number: signal.Signals
) -> None:
    project = clone("warned", SETTINGS | {"vae.steps": 5000, "vae.checkpoint_every": 5000}, [])
    sliced(project)
    stage(project, "code")
    with (project / "stage.log").open("w+") as log:
        process = started(project, "vae", stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while (
            not (logs := list(project.glob("runs/vae/*/metrics.jsonl"))) or len(rows(logs[0])) < 4
        ):
            assert process.poll() is None, (project / "stage.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(120) == 130
    step = rows(logs[0])[-1]["step"]
    said = (project / "stage.log").read_text().splitlines()
    assert f"error: vae: interrupted, saved at step {step} of 5000; run it again to go on" in said
    assert not any("Traceback" in line for line in said)
    newest = newest_checkpoint(logs[0].parent / "checkpoints")
    assert newest is not None
    assert newest[0] == step


def rows(log: Path) -> list[dict[str, float]]:
    return list(MetricLog(log).rows())


def sliced(project: Path) -> dict[str, str]:
    """Lay the slices of the photographs; image ids by their names."""
    (project / "photos").mkdir()
    rows = []
    for number, (name, size) in enumerate(PHOTOGRAPHS.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        path = project / "photos" / f"{name}.png"
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"image_id": digest, "uri": f"photos/{name}.png"})
    table = pd.DataFrame(rows)
    for name, part in {"vae": table, "eval": table[:1]}.items():
        write_table(part, project / "data" / "slices" / f"{name}.parquet")
    return dict(zip(PHOTOGRAPHS, table["image_id"], strict=True))


def started(project: Path, name: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "stage", "run", name], cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)}, text=True, **options,
    )  # fmt: skip


def stage(project: Path, name: str) -> str:
    done = started(project, name, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = done.communicate()
    assert done.returncode == 0, said[-5000:]
    return said
