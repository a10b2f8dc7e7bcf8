"""The registry: what opens, what it yields, and that missing weights never wait."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.evaluation.measuring.reconstruction import fidelity_metrics
from components.metrics.cards import CARDS
from components.metrics.metric import ImageMetric, Picture
from components.metrics.metric_card import MetricFamily
from components.metrics.native.texture import texture_metrics
from components.metrics.registry import METRICS, open_metric


def _picture(folder: Path, seed: int, reference: Path | None = None) -> tuple[np.ndarray, Picture]:
    rgb = np.random.default_rng(seed).integers(0, 256, (256, 272, 3), dtype=np.uint8)
    path = folder / f"{seed}.png"
    Image.fromarray(rgb).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return rgb, Picture(path, digest, reference=reference)


def test_the_registry_yields_what_the_stage_measures(tmp_path: Path) -> None:
    rgb, picture = _picture(tmp_path, 1)
    expected = texture_metrics(rgb)
    for metric_id, value in expected.items():
        metric = open_metric(metric_id, tmp_path)
        assert isinstance(metric, ImageMetric)
        values = metric.measure(rgb, picture)
        assert tuple(values) == metric.ids
        assert values[metric_id] == value


def test_pair_metrics_read_the_reference_of_the_picture(tmp_path: Path) -> None:
    first, _ = _picture(tmp_path, 1)
    second, picture = _picture(tmp_path, 2, reference=tmp_path / "1.png")
    for name, value in fidelity_metrics(first, second).items():
        metric = open_metric(name, tmp_path)
        assert isinstance(metric, ImageMetric)
        assert metric.measure(second, picture) == {name: value}


def test_a_pair_metric_without_a_reference_names_the_picture(tmp_path: Path) -> None:
    rgb, picture = _picture(tmp_path, 3)
    metric = open_metric("ssim", tmp_path)
    assert isinstance(metric, ImageMetric)
    with pytest.raises(ValueError, match=r"3\.png: this metric compares with a reference"):
        metric.measure(rgb, picture)


@pytest.mark.parametrize("metric_id", [c.id for c in CARDS if c.weights is None])
def test_every_weight_free_card_opens(metric_id: str, tmp_path: Path) -> None:
    assert metric_id in open_metric(metric_id, tmp_path).ids


@pytest.mark.parametrize("family", METRICS, ids=lambda family: family.cards[0].id)
def test_a_family_needs_one_thing(family: MetricFamily) -> None:
    assert len({card.needs for card in family.cards}) == 1
    assert all(card.weights == family.cards[0].weights for card in family.cards)


@pytest.mark.parametrize(
    ("name", "said"),
    [("bleu", "'bleu'; known: "), ("psnr", r"'psnr'; did you mean 'psnr_db'\?; known: ")],
)
def test_an_unknown_metric_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"unknown metric {said}"):
        open_metric(name, tmp_path)


def test_only_what_was_asked_for_is_measured(tmp_path: Path) -> None:
    from components.evaluation.measuring.evaluation_run import open_metrics

    for name in ("psnr_db", "nmse", "ssim", "ms_ssim"):
        assert open_metrics([name], tmp_path, "cpu").ids == (name,)
