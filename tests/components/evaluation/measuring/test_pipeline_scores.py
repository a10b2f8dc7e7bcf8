"""What the pipeline measures of itself: the library's numbers, each picture once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.measuring import pipeline_scores
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.measuring.reconstruction import fidelity_metrics, reconstruct
from components.evaluation.statistics import scores
from components.evaluation.statistics.non_inferiority import judge_non_inferiority
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.metrics.native.texture import texture_metrics
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.models.tiny import build_tiny_autoencoder
from components.settings.evaluation import NonInferioritySettings
from components.settings.schema import Settings, parse_settings
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
def settings(root: Path, tmp_path: Path) -> Settings:
    params = read_params(root)
    params["generate"]["sizes"] = SIZES
    params["evaluate"]["reconstruction_images"] = 1
    other = build_tiny_autoencoder(seed=5)
    other.save_pretrained(tmp_path / "data" / "vae" / "autoencoder")
    return parse_settings(params)


def values_by(found: list[scores.Score]) -> dict[tuple[Any, ...], float | None]:
    return {(s.image, s.system, s.height, s.width, s.metric): s.value for s in found}


def test_photographs_have_the_numbers_of_the_library_and_are_measured_once(
    settings: Settings, tmp_path: Path
) -> None:
    rows = held_out(tmp_path, 2)
    first = list(pipeline_scores.photograph_scores(tmp_path, settings, rows))
    expected: dict[tuple[Any, ...], float | None] = {}
    base = load_base_autoencoder(settings.models.autoencoder, settings.project.seed, tmp_path)
    trained = build_tiny_autoencoder(seed=5)
    for place, row in enumerate(rows.to_dict("records")):
        photo = Image.open(tmp_path / row["uri"])
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
        (tmp_path / uri).write_bytes(b"not a picture")
    assert list(pipeline_scores.photograph_scores(tmp_path, settings, rows)) == first


def _patterned(path: Path, level: float) -> None:
    """A smooth picture with a checkerboard of 16 px cells' period, `level` grey levels strong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(path.stem))
    coarse = Image.fromarray(rng.integers(80, 176, (8, 8), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC)).astype(float)
    wave = np.sin(2 * np.pi * np.arange(256) / 16)
    grid = np.clip(smooth + level * (wave[:, None] + wave), 0, 255).round().astype(np.uint8)
    Image.fromarray(np.stack([grid] * 3, axis=2)).save(path)


def _with_patterns(root: Path, level: float, *, lattice: bool) -> pd.DataFrame:
    folder = root / "data" / "generate"
    lines = []
    for number in range(8):
        _patterned(folder / "images" / f"{number}.png", level)
        record = {"file": f"{number}.png", "height": 256, "width": 256, "prompt": f"p{number}"}
        lines.append(json.dumps(record) + "\n")
    (folder / "generations.jsonl").write_text("".join(lines))
    return scores.scores_table(pipeline_scores.generated_scores(root, lattice=lattice))


def test_a_lattice_is_measured_where_the_settings_ask_and_then_decides_the_gate(
    settings: Settings, tmp_path: Path
) -> None:
    rule = NonInferioritySettings(system="generated", metric="lattice_16px", margin=0.5)
    gate = settings.promote.model_copy(update={"non_inferiority": (rule,), "resamples": 999})
    before = _with_patterns(tmp_path, 0.0, lattice=True)
    for level, passed in ((0.2, True), (4.0, False)):
        after = _with_patterns(tmp_path, level, lattice=True)
        (judged,) = judge_non_inferiority(before, after, gate, 0)
        assert judged["passed"] is passed
    without = _with_patterns(tmp_path, 0.0, lattice=False)
    assert not set(without["metric"]) & set(pipeline_scores.LATTICE_IDS)
    (judged,) = judge_non_inferiority(before, without, gate, 0)
    assert judged["passed"] is False
    assert "evaluate.lattice" in judged["reason"]


def test_the_stage_passes_the_setting_on(settings: Settings, tmp_path: Path) -> None:
    held_out(tmp_path, 1).to_parquet(_made(tmp_path / pipeline_scores.HELD_OUT))
    _with_patterns(tmp_path, 0.0, lattice=False)
    for asked in (False, True):
        evaluate = settings.evaluate.model_copy(update={"lattice": asked})
        table = pipeline_scores.pipeline_scores(
            tmp_path, settings.model_copy(update={"evaluate": evaluate})
        )
        assert ("lattice_16px" in set(table["metric"])) is asked


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_one_more_generated_picture_is_one_more_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "generate"
    measured: list[tuple[int, ...]] = []

    def counted(rgb: np.ndarray[Any, Any]) -> dict[str, float | None]:
        measured.append(rgb.shape)
        return texture_metrics(rgb)

    monkeypatch.setattr(pipeline_scores, "texture_metrics", counted)

    def generate(count: int) -> list[scores.Score]:
        lines = []
        for number in range(count):
            picture(folder / "images" / f"{number}.png", 50 + number)
            record = {"file": f"{number}.png", "height": 80, "width": 120, "prompt": f"p{number}"}
            lines.append(json.dumps(record))
        (folder / "generations.jsonl").write_text("\n".join(lines) + "\n")
        return list(pipeline_scores.generated_scores(tmp_path))

    first = generate(2)
    assert len(measured) == 2
    assert {score.prompt for score in first} == {"p0", "p1"}
    with Image.open(folder / "images" / "1.png") as image:
        expected = texture_metrics(np.asarray(image))
    assert {s.metric: s.value for s in first if s.image == "1.png"} == expected
    assert generate(3)[: len(first)] == first
    assert len(measured) == 3
    # One merged file, as after any number of runs.
    assert len(list((tmp_path / pipeline_scores.LEDGER / "values").glob("part-*"))) == 1
    assert Ledger(tmp_path / pipeline_scores.LEDGER).table().num_rows == 3 * len(expected)
