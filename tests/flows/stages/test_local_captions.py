"""`ultraflux stage run caption` with weights of a local folder: killed, resumed, the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from skimage import data

from components.corpus.manifest import read_table, write_table
from components.corpus.tiny_captioner import write_tiny_captioner
from components.files.parquet_files import write_parquet
from components.files.weight_folders import folder_digest
from components.settings.schema import load_settings
from components.signals.candidate import DERIVATIVES_SCHEMA, derivative_jpeg

ROOT = Path(__file__).parents[3]
IMAGES = 40
STAGE = [sys.executable, "-m", "flows.cli", "stage", "run"]
COMMAND = [*STAGE, "caption"]


@pytest.fixture
def project(clone: Callable[..., Path]) -> Path:
    """A clone whose photographs were selected, and none of them captioned."""
    none = load_settings(ROOT / "params.yaml").caption.translate.model_dump() | {"provider": "none"}
    settings = {
        "caption.provider": "local",
        "caption.local": {"folder": "weights/tiny", "batch_size": 2, "max_new_tokens": 12},
        "caption.min_words": 2,
        "caption.translate": none,
        "ingest.source": "photos",
        "runtime.workers": 1,
    }
    root = clone("local", settings)
    (root / "photos").mkdir()
    names = [f"{n:064x}" for n in range(IMAGES)]
    table = pd.DataFrame({"image_id": names, "uri": [f"photos/{name}.jpg" for name in names]})
    write_table(table.assign(kept=True), root / "data" / "select" / "manifest.parquet")
    pixels = data.astronaut()[::8, ::8]
    pictures = [derivative_jpeg(np.roll(pixels, n, axis=1), 64) for n in range(IMAGES)]
    rows = [
        {"image_id": name, "height": 64, "width": 64, "jpeg": jpeg}
        for name, jpeg in zip(names, pictures, strict=True)
    ]
    for name, jpeg in zip(names, pictures, strict=True):
        (root / "photos" / f"{name}.jpg").write_bytes(jpeg)
    derivatives = pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA)
    write_parquet(derivatives, root / "data" / "signals" / "derivatives.parquet")
    return root


def command(root: Path) -> dict[str, Any]:
    # The clone's own code, in the processes of the engine, too.
    environment = os.environ | {"PYTHONPATH": str(root)}
    return {"cwd": root, "env": environment, "start_new_session": True}


@pytest.mark.slow
def test_a_killed_stage_asks_the_model_for_no_batch_twice_and_ends_with_the_same_bytes(
    project: Path,
) -> None:
    for stage in ("code", "source"):
        subprocess.run([*STAGE, stage], check=True, **command(project))
    missing = subprocess.run(COMMAND, capture_output=True, text=True, **command(project))
    assert missing.returncode != 0
    error = [line for line in missing.stderr.splitlines() if "weights/tiny" in line]
    assert len(error) == 1
    assert "get it with: hf download Qwen/" in error[0]

    write_tiny_captioner(project / "weights" / "tiny", seed=0)
    state = project / "runs" / "caption-local"
    killed = subprocess.Popen(COMMAND, **command(project))
    deadline = time.monotonic() + 500
    while not list(state.glob("*.parquet")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    path = project / "data" / "caption" / "manifest.parquet"
    assert not path.exists()
    finished = {shard: shard.read_bytes() for shard in state.glob("*.parquet")}
    assert 0 < len(finished) < IMAGES // 2

    subprocess.run(COMMAND, check=True, **command(project))
    assert all(shard.read_bytes() == content for shard, content in finished.items())
    resumed = path.read_bytes()
    table = read_table(path)
    digest = folder_digest(project / "weights" / "tiny")
    assert set(table["caption_model"]) == {f"tiny sha256:{digest}, prompt detailed-1"}
    assert table["caption_status"].eq("ok").sum() > IMAGES // 2
    assert table["caption_en"].nunique() > 1

    shutil.rmtree(state)
    path.unlink()
    subprocess.run(COMMAND, check=True, **command(project))
    assert path.read_bytes() == resumed
