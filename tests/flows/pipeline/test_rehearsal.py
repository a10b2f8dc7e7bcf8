"""A rehearsal and a new profile through the command, in clones with photographs of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from components.settings.schema import load_settings
from flows.pipeline.rehearsal import MANY_ITEMS, is_due, read_outcome

WORDS = (
    "A narrow path of pale stones climbs between low walls towards a wooden gate, while soft light "
    "falls through the branches of two old trees and leaves long shadows on the wet grass."
)


def photographs(folder: Path, count: int) -> None:
    """Textured pictures of 1.1 megapixels, each with a caption; three endings."""
    folder.mkdir(parents=True)
    lines = []
    for n in range(count):
        rng = np.random.default_rng(n)
        coarse = rng.integers(0, 256, (9, 12, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((1200, 900), Image.Resampling.BICUBIC))
        noise = rng.integers(-60, 60, image.shape)
        name = f"{n:03}{('.jpg', '.jfif', '.png')[n % 3]}"
        pixels = np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG" if name.endswith("png") else "JPEG")
        caption = f"{WORDS} Number {n} of the series shows the gate from another side."
        lines.append(json.dumps({"file": name, "caption_en": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def ultraflux(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ultraflux", *arguments], cwd=project, capture_output=True, text=True, timeout=900
    )


def untouched(project: Path) -> bool:
    """Whether no stage has written outputs, and DVC no lock."""
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    made = [name for name in stages if (project / "data" / name).exists()]
    return not made and not (project / "dvc.lock").exists()


@pytest.fixture(scope="module")
def project(clone: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with a profile for a dozen photographs outside it."""
    folder = tmp_path_factory.mktemp("own") / "My Photos"
    photographs(folder, 12)
    (folder / "later.heic").write_bytes(b"x")
    made = clone("own", {})
    done = ultraflux(made, "new", str(folder))
    assert done.returncode == 0, done.stderr
    assert "12 of 12 photographs have fewer than 8,294,400 pixels" in done.stdout
    assert "not read: 1 .heic" in done.stdout
    assert "Of 12 measured 12 pass" in done.stdout
    assert untouched(made)
    again = ultraflux(made, "new", str(folder))
    assert again.returncode == 2
    assert "exists already" in again.stderr
    done = ultraflux(made, "config", "compose", "--profile", "my-photos")
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.slow
def test_a_rehearsal_passes_every_corpus_stage_and_leaves_the_clone_alone(project: Path) -> None:
    params = (project / "params.yaml").read_bytes()
    done = ultraflux(project, "corpus", "rehearse", "-n", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 12 items" in done.stdout
    assert untouched(project)
    assert (project / "params.yaml").read_bytes() == params
    outcome = read_outcome(project)
    assert outcome is not None
    assert outcome["problem"] is None
    stages = {stage["stage"]: stage for stage in outcome["stages"]}
    order = ["ingest", "signals", "select", "caption", "validate", "slices"]
    assert [name for name in stages if name in order] == order
    assert stages["select"]["rows_out"] == outcome["rejected"]["kept"] == 4
    assert not is_due(project, load_settings(project / "params.yaml"))


@pytest.mark.slow
def test_a_new_profile_leads_to_slices_with_rows(project: Path) -> None:
    done = ultraflux(project, "run", "--until", "slices")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = pd.read_parquet(project / "data" / "slices" / "manifest.parquet")
    assert len(manifest) == 12
    assert manifest["kept"].sum() >= 10
    assert manifest["photographer"].isna().all()
    assert len(pd.read_parquet(project / "data" / "slices" / "stage1.parquet")) > 0


def wrong_late(clone: Callable[..., Path], name: str) -> Path:
    """A clone with many files, and a table beside them that only the stage `ingest` reads."""
    made = clone(name, {"ingest.source": "photos", "ingest.attribution": "ATTRIBUTION.csv"}, [])
    folder = made / "photos"
    folder.mkdir()
    for n in range(MANY_ITEMS + 1):
        (folder / f"{n:04}.jpg").write_bytes(b"no picture %d" % n)
    (folder / "ATTRIBUTION.csv").write_text("file,author\n0000.jpg,a\n0000.jpg,b\n")
    return made


@pytest.mark.slow
def test_a_plain_dvc_repro_rehearses_before_it_ingests_unless_it_is_told_not_to(
    clone: Callable[..., Path],
) -> None:
    made = wrong_late(clone, "repro")
    for left_out in ("", "1"):
        environment = os.environ | {"PYTHONPATH": str(made), "ULTRAFLUX_NO_REHEARSAL": left_out}
        done = subprocess.run(
            ["dvc", "repro", "-q", "ingest"],
            cwd=made,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode != 0
        assert ("error: rehearsal of 100 items: ingest: ATTR" in done.stderr) == (not left_out)
        assert "ATTRIBUTION.csv line 3: '0000.jpg' is listed twice" in done.stderr
        assert not (made / "data" / "ingest" / "manifest.parquet").exists()
        assert ("ULTRAFLUX_NO_REHEARSAL=1" in done.stderr) == (not left_out)


def test_a_large_source_that_would_fail_late_stops_the_run_at_once(
    clone: Callable[..., Path],
) -> None:
    made = wrong_late(clone, "large")
    folder = made / "photos"
    done = ultraflux(made, "run", "--until", "ingest")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: rehearsal of 100 items: ingest: ATTRIBUTION.csv line 3: '0000.jpg' is listed twice"
    )
    assert "--no-rehearsal" in done.stderr
    assert untouched(made)
    outcome = read_outcome(made)
    assert outcome is not None
    said = {stage["stage"]: stage["status"] for stage in outcome["stages"]}
    assert (said["ingest"], said["signals"], said["slices"]) == ("failed", *["not reached"] * 2)
    settings = load_settings(made / "params.yaml")
    assert is_due(made, settings)
    (folder / "0000.jpg").unlink()
    assert not is_due(made, settings)
