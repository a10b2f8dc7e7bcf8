"""What the evaluate stage measures: the library's numbers, each picture once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.measuring.ledger import Ledger
from components.evaluation.measuring.reconstruction import fidelity_metrics, reconstruct
from components.evaluation.statistics import scores
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.metrics.native.texture import texture_metrics
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.models.tiny import build_tiny_autoencoder
from components.settings.schema import parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import evaluate
from flows.stages.contract import StageContext
from flows.versioning.setting_overrides import read_params

SIZES = [[64, 96], [96, 64]]


def picture(path: Path, seed: int, size: tuple[int, int] = (80, 120)) -> str:
    """Write noise of (height, width); the sha256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def held_out(root: Path, count: int) -> pd.DataFrame:
    rows = [
        {
            "image_id": picture(root / f"photo{number}.png", number),
            "uri": f"photo{number}.png",
            "bucket_height": 64,
            "bucket_width": 96,
        }
        for number in range(count)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def context(root: Path, tmp_path: Path) -> StageContext:
    params = read_params(root)
    params["generate"]["sizes"] = SIZES
    params["evaluate"]["reconstruction_images"] = 1
    settings = parse_settings(params)
    other = build_tiny_autoencoder(seed=5)
    other.save_pretrained(tmp_path / "data" / "vae" / "autoencoder")
    log = MetricLog(tmp_path / "metrics.jsonl")
    return StageContext("evaluate", settings, tmp_path, tmp_path / "state", log)


def values_by(found: list[scores.Score]) -> dict[tuple[Any, ...], float | None]:
    return {(s.image, s.system, s.height, s.width, s.metric): s.value for s in found}


def test_photographs_have_the_numbers_of_the_library_and_are_measured_once(
    context: StageContext,
) -> None:
    rows = held_out(context.root, 2)
    first = list(evaluate._photograph_scores(context, rows))
    expected: dict[tuple[Any, ...], float | None] = {}
    settings = context.settings
    base = load_base_autoencoder(settings.models.autoencoder, settings.project.seed, context.root)
    trained = build_tiny_autoencoder(seed=5)
    for place, row in enumerate(rows.to_dict("records")):
        photo = Image.open(context.root / row["uri"])
        if place == 0:
            fitted = np.asarray(fit_to_bucket(photo, Bucket(64, 96)))
            for system, model in (
                (scores.RECONSTRUCTION_BEFORE, base),
                (scores.RECONSTRUCTION_AFTER, trained),
            ):
                for metric, value in fidelity_metrics(fitted, reconstruct(model, fitted)).items():
                    expected[row["image_id"], system, 64, 96, metric] = value
        for height, width in SIZES:
            fitted = np.asarray(fit_to_bucket(photo, Bucket(height, width)))
            for metric, value in texture_metrics(fitted).items():
                expected[row["image_id"], scores.PHOTOGRAPHS, height, width, metric] = value
    assert values_by(first) == expected

    # Damaged bytes would be refused: what is known is not even read.
    for uri in rows["uri"]:
        (context.root / uri).write_bytes(b"not a picture")
    assert list(evaluate._photograph_scores(context, rows)) == first


def test_one_more_generated_picture_is_one_more_measurement(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = context.root / "data" / "generate"
    measured: list[tuple[int, ...]] = []

    def counted(rgb: np.ndarray[Any, Any]) -> dict[str, float | None]:
        measured.append(rgb.shape)
        return texture_metrics(rgb)

    monkeypatch.setattr(evaluate, "texture_metrics", counted)

    def generate(count: int) -> list[scores.Score]:
        lines = []
        for number in range(count):
            picture(folder / "images" / f"{number}.png", 50 + number)
            record = {"file": f"{number}.png", "height": 80, "width": 120, "prompt": f"p{number}"}
            lines.append(json.dumps(record))
        (folder / "generations.jsonl").write_text("\n".join(lines) + "\n")
        return list(evaluate._generated_scores(context))

    first = generate(2)
    assert len(measured) == 2
    assert {score.prompt for score in first} == {"p0", "p1"}
    with Image.open(folder / "images" / "1.png") as image:
        expected = texture_metrics(np.asarray(image))
    assert {s.metric: s.value for s in first if s.image == "1.png"} == expected
    assert generate(3)[: len(first)] == first
    assert len(measured) == 3
    # One merged file, as after any number of runs.
    assert len(list((context.root / evaluate.LEDGER / "values").glob("part-*"))) == 1
    assert Ledger(context.root / evaluate.LEDGER).table().num_rows == 3 * len(expected)
