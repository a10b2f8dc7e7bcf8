"""From pictures to a decision by the commands alone: evaluate, killed and resumed, report, gate."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_project
import yaml
from PIL import Image, ImageFilter

from components.evaluation.measuring.ledger import Ledger
from components.settings.schema import parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import promote
from flows.stages.contract import StageContext

PICTURES = 8
VALUES = 8
"""Numbers of one picture: `weight-free` brings the textbook GLCM entropy along."""
RULE = {"system": "generated", "metric": "glcm_score", "margin": 0.02}
WORDS = ("real", "--system", "photos=references", "--metrics", "weight-free,ssim")


def photograph(number: int) -> Image.Image:
    """Noise of one scale over a ramp, so that pictures differ in every metric."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    ramp = np.linspace(0, 60 + 10 * number, 480)[None, :, None]
    noise = rng.normal(0, 12, (360, 480, 3))
    pixels = np.asarray(coarse.resize((480, 360))).astype(np.float64) * 0.5 + ramp + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """Settings, a folder of photographs with prompts, and two systems: as good, and blurred."""
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy2(root / name, tmp_path / name)
    for name in ("conf", "mlflow"):
        shutil.copytree(root / name, tmp_path / name)
    for name in ("real", "same", "blurred"):
        (tmp_path / name).mkdir()
    lines = []
    for number in range(PICTURES):
        picture, name = photograph(number), f"{number}.png"
        picture.save(tmp_path / "real" / name)
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "same" / name)
        picture.filter(ImageFilter.GaussianBlur(2)).save(tmp_path / "blurred" / name)
        lines.append(json.dumps({"file_name": name, "text": f"noise number {number}"}))
    (tmp_path / "real" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def start(project: Path, root: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def ultraflux(project: Path, root: Path, *words: str) -> str:
    return finish(start(project, root, *words))


def test_one_more_picture_in_a_scored_folder_is_one_picture_measured(
    project: Path, root: Path
) -> None:
    words = ("evaluate", "real", "--system", "generated=same", "--metrics", "weight-free")
    assert f"{PICTURES} pictures, {PICTURES} decoded" in ultraflux(project, root, *words)
    photograph(99).save(project / "real" / "99.png")
    photograph(98).save(project / "same" / "99.png")
    with (project / "real" / "metadata.jsonl").open("a") as metadata:
        metadata.write("\n" + json.dumps({"file_name": "99.png", "text": "one more"}))
    # Other names for what is there already change nothing.
    metadata_file = project / "real" / "metadata.jsonl"
    metadata_file.write_text(metadata_file.read_text().replace('"0.png"', '"zero.png"'))
    for folder in ("real", "same"):
        (project / folder / "0.png").rename(project / folder / "zero.png")
    # The items are others than those that the folder is locked to.
    said = ultraflux(project, root, *words, "--relock")
    assert f"{PICTURES + 1} pictures, 1 decoded, {VALUES} values computed" in said
    assert f"{PICTURES * VALUES} found in the ledger" in said


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_bytes_of_scores_and_report(
    project: Path, root: Path
) -> None:
    def begin(where: str) -> subprocess.Popen[str]:
        places = ("--out", f"{where}/out", "--ledger", f"{where}/ledger")
        return start(project, root, "evaluate", *WORDS, "--system", "mine=blurred", *places)

    killed = begin("killed")
    values = project / "killed" / "ledger" / "values"
    deadline = time.monotonic() + 300
    while len(list(values.glob("part-*"))) < 3 and killed.poll() is None:
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = {key.image_sha256 for key in Ledger(project / "killed" / "ledger")._merged(None)}
    assert 0 < len(kept) < 2 * PICTURES
    assert not (project / "killed" / "out" / "scores.parquet").exists()

    resumed = finish(begin("killed"))
    assert f"{2 * PICTURES} pictures, {2 * PICTURES - len(kept)} decoded" in resumed
    assert f"{2 * PICTURES} pictures, {2 * PICTURES} decoded" in finish(begin("whole"))
    for where in ("killed", "whole"):
        ultraflux(project, root, "report", f"{where}/out")
    for name in ("scores.parquet", "metrics.json", "pictures.jsonl", "report.html"):
        ours, theirs = ((project / where / "out" / name) for where in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
def test_a_worse_system_is_refused_and_the_report_says_by_which_rule(
    project: Path, root: Path
) -> None:
    for system in ("same", "blurred"):
        words = ("evaluate", *WORDS, "--system", f"generated={system}", "--out", system)
        ultraflux(project, root, *words)
    shutil.move(project / "blurred" / "scores.parquet", project / "candidate.parquet")
    baseline = project / "same" / "scores.parquet"
    digest = hashlib.sha256(baseline.read_bytes()).hexdigest()
    (project / "data" / "evaluate").mkdir(parents=True)
    (project / "data" / "evaluate" / "metrics.json").write_text(json.dumps(small_project.LEARNED))
    for weights in ("data/vae/autoencoder", "data/dit_stage2/ema"):
        (project / weights).mkdir(parents=True)
        (project / weights / "model.safetensors").write_bytes(b"weights")
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["promote"] |= {
        "baseline": {"scores": "same/scores.parquet", "sha256": digest},
        "non_inferiority": [RULE],
    }
    settings = parse_settings(values)

    def judge(scores: Path) -> dict[str, float]:
        shutil.copy2(scores, project / "data" / "evaluate" / "scores.parquet")
        log = MetricLog(project / "runs" / "metrics.jsonl")
        return promote.run(
            StageContext("promote", settings, project, project / "runs", log)
        ).metrics

    assert judge(baseline)["promoted"] == 1.0
    refused = judge(project / "candidate.parquet")
    assert refused["promoted"] == 0.0
    assert refused["margin.generated.glcm_score"] < 0
    ultraflux(project, root, "report", "same", "--decision", "data/promote/decision.json")
    page = (project / "same" / "report.html").read_text()
    assert "generated.glcm_score" in page
    assert "at most 0.02 may be lost" in page
