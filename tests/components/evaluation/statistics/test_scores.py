"""The long table and its summaries."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components.evaluation.statistics import scores
from components.evaluation.suites.suite_scores import count_note


def pair(image: str, before: float, after: float) -> list[scores.Score]:
    return [
        *scores.image_scores(image, scores.RECONSTRUCTION_BEFORE, (32, 64), {"psnr_db": before}),
        *scores.image_scores(image, scores.RECONSTRUCTION_AFTER, (32, 64), {"psnr_db": after}),
    ]


def test_infinite_is_identical_only_where_higher_is_better() -> None:
    metrics = {"s.psnr_db_infinite": 4.0, "s.psnr_db_n": 3.0, "s.nmse_infinite": 2.0}
    assert count_note(metrics, "s.psnr_db") == "4 of 7 identical"
    assert count_note(metrics, "s.nmse") == "2 of 2 infinite"
    assert count_note(metrics, "s.ssim") == ""


def test_gain_pairs_images_and_carries_an_interval_from_two_images_on() -> None:
    table = scores.scores_table([*pair("a", 20.0, 24.0), *pair("b", 30.0, 32.0)])
    metrics = scores.headline_metrics(table, resamples=500, seed=0)
    assert metrics["vae_psnr_gain_db"] == 3.0
    # Gains of 4 and 2 dB: Student's t with one degree of freedom reaches 12.706 standard errors.
    assert metrics["vae_psnr_gain_db_low"] == pytest.approx(3.0 - 12.706, abs=1e-3)
    assert metrics["vae_psnr_gain_db_high"] == pytest.approx(3.0 + 12.706, abs=1e-3)
    assert metrics["reconstruction_after_psnr_db"] == 28.0


def test_one_image_gives_a_gain_without_an_interval() -> None:
    metrics = scores.headline_metrics(
        scores.scores_table(pair("a", 20.0, 24.0)), resamples=500, seed=0
    )
    assert metrics["vae_psnr_gain_db"] == 4.0
    assert "vae_psnr_gain_db_low" not in metrics


def test_order_of_rows_does_not_depend_on_order_of_input() -> None:
    rows = [*pair("b", 1.0, 2.0), *pair("a", 3.0, 4.0)]
    assert scores.scores_table(rows).equals(scores.scores_table(reversed(rows)))


def test_unmeasurable_values_stay_in_the_table_and_out_of_the_means() -> None:
    rows = [
        *scores.image_scores("x", scores.GENERATED, (64, 64), {"flat_fraction": None}),
        *scores.image_scores("y", scores.GENERATED, (256, 256), {"flat_fraction": 0.5}),
    ]
    table = scores.scores_table(rows)
    assert len(table) == 2
    metrics = scores.headline_metrics(table, resamples=500, seed=0)
    assert metrics["generated_flat_fraction"] == 0.5


def test_compression_ratio_of_a_set_weighs_by_bytes() -> None:
    rows = [
        *scores.image_scores("x", scores.GENERATED, (10, 10), {"compression_ratio": 2.0}),
        *scores.image_scores("y", scores.GENERATED, (10, 30), {"compression_ratio": 6.0}),
    ]
    metrics = scores.headline_metrics(scores.scores_table(rows), resamples=500, seed=0)
    assert metrics["generated_compression_ratio"] == pytest.approx(4.0)


def test_a_picture_counts_once_at_each_size_however_many_metrics_it_has() -> None:
    values = {"entropy_bits": 2.0, "flat_fraction": 0.5}
    rows = [
        row
        for name, size in (("x", (64, 64)), ("x", (64, 96)), ("x", (96, 64)), ("y", (64, 64)))
        for row in scores.image_scores(name, scores.GENERATED, size, values)
    ]
    metrics = scores.headline_metrics(scores.scores_table(rows), resamples=500, seed=0)
    assert metrics["generated_images"] == 4.0


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        scores.image_scores("x", scores.GENERATED, (10, 10), {"beauty": 1.0})


def test_prompts_stay_with_their_rows_and_none_is_none(tmp_path: Path) -> None:
    rows = [
        *scores.image_scores("x", scores.GENERATED, (10, 10), {"entropy_bits": 2.0}, "a lake"),
        *scores.image_scores("y", scores.PHOTOGRAPHS, (10, 10), {"entropy_bits": 3.0}),
    ]
    scores.scores_table(rows).to_parquet(tmp_path / "scores.parquet", index=False)
    table = pd.read_parquet(tmp_path / "scores.parquet").set_index("image")
    assert table.loc["x", "prompt"] == "a lake"
    assert pd.isna(table.loc["y", "prompt"])
    alone = scores.scores_table(rows[1:])
    assert alone["prompt"].dtype == scores.scores_table(rows)["prompt"].dtype
