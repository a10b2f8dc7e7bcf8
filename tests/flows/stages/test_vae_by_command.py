"""`ultraflux stage run vae` over a slice with photographs that hold no crop."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.corpus.manifest import write_table

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
    (project / "photos").mkdir()
    rows = []
    for number, (name, size) in enumerate(PHOTOGRAPHS.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        path = project / "photos" / f"{name}.png"
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"image_id": digest, "uri": f"photos/{name}.png"})
    table = pd.DataFrame(rows)
    narrow = dict(zip(PHOTOGRAPHS, table["image_id"], strict=True))
    for name, part in {"vae": table, "eval": table[:1]}.items():
        write_table(part, project / "data" / "slices" / f"{name}.parquet")

    def stage(name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "stage", "run", name], cwd=project,
            env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    stage("code")
    said = stage("vae")
    assert "left out: 2 too narrow for a crop (left_out.csv)" in said
    metrics = json.loads((project / "data" / "vae" / "metrics.json").read_text())
    assert (metrics["left_out_narrow"], metrics["left_out_undecodable"]) == (2, 0)
    lost = pd.read_csv(project / "data" / "vae" / "left_out.csv").set_index("image_id")
    assert set(lost.index) == {narrow["strip"], narrow["panorama"]}
    assert "100x2048 is 50x1024" in " ".join(map(str, lost.loc[narrow["panorama"]]))
