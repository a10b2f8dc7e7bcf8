"""`ultraflux evaluate` from the command line, on pictures small enough for a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder without code: settings and what marks its root."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy2(root / name, folder / name)
    shutil.copytree(root / "conf", folder / "conf")
    rng = np.random.default_rng(0)
    records = []
    for number in range(3):
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        other = np.clip(pixels.astype(np.int16) + 10, 0, 255).astype(np.uint8)
        for kind, array in (("real", pixels), ("mine", other)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{number}.png")
        records.append(json.dumps({"file_name": f"{number}.png", "text": f"noise {number}"}))
    (folder / "real" / "metadata.jsonl").write_text("\n".join(records))
    return folder


Typed = Callable[..., subprocess.CompletedProcess[str]]


def evaluate(project: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "evaluate", *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_two_systems_are_measured_once_and_reported(
    project: Path, root: Path, typed: Typed
) -> None:
    words = (
        *("real", "--system", "photos=references", "--system", "mine=mine"),
        *("--metrics", "compression_ratio,colourfulness,hpsv3,fid"),
    )
    first = evaluate(project, root, *words)
    assert first.returncode == 0, first.stderr
    assert "6 pictures, 6 decoded" in first.stdout
    assert first.stdout.count("not measured: hpsv3") == 1
    assert first.stdout.count("not measured: fid") == 1
    out = project / "runs" / "evaluations" / "real"
    table = pd.read_parquet(out / "scores.parquet")
    assert set(table["system"]) == {"photos", "mine"}
    assert len(table) == 12
    assert table["value"].notna().all()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"]["mine.colourfulness_n"] == 3.0
    kept = {name: (out / name).read_bytes() for name in ("scores.parquet", "metrics.json")}

    again = typed(project, "evaluate", *words)
    assert "6 pictures, 0 decoded, 0 values computed" in again.stdout
    assert kept == {name: (out / name).read_bytes() for name in kept}


def test_json_says_what_the_tables_say(project: Path, typed: Typed) -> None:
    words = ("real", "--system", "a=references", "--system", "mine=mine", "--baseline", "a")
    done = typed(project, "evaluate", *words, "--metrics", "colourfulness,psnr_db,hpsv3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept = json.loads((project / "runs" / "evaluations" / "real" / "metrics.json").read_text())
    assert found["metrics"] == kept["metrics"]
    assert found["metrics"]["a.psnr_db_infinite"] == 3
    assert (found["suite"], found["items"], found["baseline"]) == ("real", 3, "a")
    assert Path(found["scores"]).is_file()
    assert found["statistics"]["pictures"] == 6
    assert "hpsv3" in found["unavailable"]
    assert [one["system"] for one in found["tests"]] == ["mine", "mine"]
    assert all("reason" in one for one in found["tests"])
    assert found["errors"] == []
    assert found["failed_systems"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("real",), "--system: name at least one"),
        (("real", "--system", "x"), "expected NAME=SPEC"),
        (("real", "--system", "..=references"), "not dots alone"),
        (("real", "--system", "x=mine", "--guidance-scale", "nan"), "nan: a number from 0"),
        (("nothing", "--system", "x=mine"), "neither a folder with metadata.jsonl nor one of"),
        (("aesthetic-eval-4096", "--system", "x=mine"), "get it with: hf download"),
        (("real", "--system", "x=mine", "--metrics", "beauty"), "unknown metric 'beauty'"),
        (("real", "--system", "x=sana"), "get it with: hf download Efficient"),
        (("runtime", "--system", "x=mine"), "x: not timed: pictures that exist"),
        (("runtime", "--system", "x=mine", "--size", "64"), "--size 64: expected WIDTHxHEIGHT"),
        (("runtime", "--system", "x=mine", "--size", "60x64"), "multiples of 16 px"),
        (("runtime", "--system", "x=mine", "--way", "fast"), "--way fast: 'fast' is none of int8"),
        (("runtime", "--system", "x=mine", "--way", "fp8"), "x: --way is of weights"),
        (("real", "--system", "x=mine", "--way", "fp8"), "--way: of the suite runtime, not of"),
        (("real", "--system", "x=mine", "--size", "32x32"), "--size: of the suite runtime"),
        (("real", "--system", "x=mine", "--warm-up", "1"), "--warm-up: of the suite runtime"),
        (("real", "--system", "x=mine", "--repeats", "3"), "--repeats: of the suite runtime"),
        (("runtime", "--system", "x=mine", "--metrics", "all"), "--metrics: of suites with scores"),
        (("runtime", "--system", "x=mine", "--baseline", "x"), "--baseline: of suites with"),
        (("runtime", "--system", "x=mine", "--relock"), "--relock: of suites with scores, not of"),
        (("real", "--system", "x=mine", "--looks", "5"), "--looks: of --stop-when-decided"),
    ],
)
def test_what_is_wrong_is_one_line(
    project: Path, words: tuple[str, ...], message: str, typed: Typed
) -> None:
    done = typed(project, "evaluate", *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_logged_numbers_reach_mlflow(project: Path, root: Path) -> None:
    from mlflow import MlflowClient

    from flows.tracking.uploader import tracking_uri

    shutil.copytree(root / "mlflow", project / "mlflow")
    words = ("--system", "mine=mine", "--metrics", "colourfulness", "--log")
    done = evaluate(project, root, "real", *words)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri(project))
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.run_name == "evaluate-real"
    assert run.info.status == "FINISHED"
    assert run.data.params["suite"] == "real"
    metrics = json.loads((project / "runs/evaluations/real/metrics.json").read_text())["metrics"]
    assert run.data.metrics["mine.colourfulness"] == metrics["mine.colourfulness"]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"metrics.json", "scores.parquet"} <= files


def test_many_metrics_of_a_few_systems_stand_in_rows_and_keep_their_names() -> None:
    from flows.commands.images.evaluation_tables import measured_table

    ids = ("glcm_score", "compression_ratio", "entropy_bits", "flat_fraction", "ssim", "psnr_db")
    numbers = {f"{name}.{i}": 1.0 for name in "ab" for i in ids}
    table = measured_table(numbers, ids, ["a", "b"])
    assert [column.header for column in table.columns] == ["metric", "a", "b"]
    assert list(table.columns[0].cells)[1] == "Compression ratio ↓"
    assert list(table.columns[2].cells)[1] == "1.00"
    few = measured_table(numbers, ids[:5], ["a", "b"])
    assert [column.header for column in few.columns][:2] == ["system", "GLCM score ↑"]
    many = measured_table(numbers, ids, [*"abcde"])
    assert list(many.columns[0].cells) == [*"abcde"]


def test_what_is_not_compared_is_said_once_a_reason() -> None:
    from flows.commands.images.evaluation_tables import not_compared

    few = "3 independent prompts or images; an interval needs at least 6"
    reasons = [f"ssim: {few}", "psnr_db: lake is 26.9 and inf", f"piqe: {few}", "no pictures"]
    assert list(not_compared("soft", reasons)) == [
        f"not compared: soft: ssim, piqe: {few}",
        "not compared: soft: psnr_db: lake is 26.9 and inf",
        "not compared: soft: no pictures",
    ]
