from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from components.corpus.derivatives import Derivative
from components.corpus.external_scores import read_external_scores
from components.corpus.quality.classical import (
    classical_scores,
    colourfulness_index,
    edge_compactness,
    exposure,
    noise_sigma,
    rms_contrast,
    score_derivative,
    sharpness,
)
from components.signals.candidate import derivative_jpeg

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 10.0])
def test_noise_sigma_is_found_in_a_plain_field(sigma: float) -> None:
    field = np.clip(np.rint(128 + sigma * RNG.standard_normal((600, 600))), 0, 255).astype(np.uint8)
    # Calm pixels are chosen by the same noise, which takes a little of it away.
    assert noise_sigma(field) == pytest.approx(sigma, rel=0.2)


def test_blur_lowers_sharpness() -> None:
    texture = RNG.integers(0, 256, (200, 200), dtype=np.uint8)
    values = [sharpness(cv2.GaussianBlur(texture, (0, 0), s)) for s in (0.5, 1, 2, 4)]
    assert values == sorted(values, reverse=True)


def test_colourfulness_of_known_fields() -> None:
    gray = np.repeat(RNG.integers(0, 256, (50, 50, 1), dtype=np.uint8), 3, axis=2)
    assert colourfulness_index(gray) == 0.0
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert colourfulness_index(red) == pytest.approx(0.3 * np.hypot(255, 127.5))


def test_exposure_and_contrast_of_known_fields() -> None:
    half = np.full((10, 10), 128, np.uint8)
    assert (exposure(half), rms_contrast(half)) == (1.0, 0.0)
    half[:, 5:] = 255
    assert exposure(half) == 0.0
    half[:, :5] = 0
    assert rms_contrast(half) == 0.5


def test_edges_in_the_centre_are_more_compact_than_edges_everywhere() -> None:
    everywhere = RNG.integers(0, 256, (400, 400), dtype=np.uint8)
    centre = np.full((400, 400), 100, np.uint8)
    centre[150:250, 150:250] = everywhere[:100, :100]
    assert edge_compactness(everywhere) < 0.1
    assert edge_compactness(centre) > 0.85
    assert edge_compactness(np.zeros((50, 50), np.uint8)) == 0.0


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(3, 40), st.integers(3, 40), st.just(3))),
)
def test_scores_and_terms_lie_between_0_and_1(pixels: np.ndarray) -> None:
    for name, value in classical_scores(pixels).items():
        assert 0.0 <= value <= 1.0, name


def test_every_score_carries_the_name_of_its_scorer() -> None:
    jpeg = derivative_jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), 64)
    row = score_derivative(Derivative("a" * 64, 640, 640, jpeg))
    assert row["quality_scorer"] == "classical-quality-v1"
    assert row["aesthetic_scorer"] == "classical-aesthetic-v1"
    tiny = derivative_jpeg(np.zeros((2, 64, 3), np.uint8), 64)
    assert "too small" in score_derivative(Derivative("a" * 64, 20, 640, tiny))["error"]


SCORES = pd.DataFrame(
    {"image_id": ["x", "y", "z"], "quality": [4.5, 3.0, 1.0], "quality_scorer": ["q-align"] * 3}
)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_external_scores_come_in_the_order_asked_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    SCORES.to_csv(path, index=False) if suffix == ".csv" else SCORES.to_parquet(path)
    table = read_external_scores(
        path, ["z", "x"], ["quality"], setting="quality.scores", numeric=["quality"]
    )
    assert table["image_id"].tolist() == ["z", "x"]
    assert table["quality"].tolist() == [1.0, 4.5]


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        (SCORES, ["x", "w"], "1 of 2 image_id have no row, first w"),
        (SCORES.drop(columns="quality"), ["x"], r"columns \['quality'\] are missing"),
        (pd.concat([SCORES, SCORES]), ["x"], "3 image_id occur more than once, first 'x'"),
        (SCORES.assign(quality=[float("nan"), 1, 2]), ["x"], "not finite numbers, first for x"),
        (SCORES.assign(quality=["good", "1", "2"]), ["x"], "not finite numbers, first for x"),
        (SCORES.assign(quality_scorer=None), ["x"], "quality_scorer: 1 values are not names"),
        (SCORES.assign(quality_scorer="a\x1b[2J"), ["x"], "quality_scorer: 1 values are not names"),
    ],
)
def test_external_scores_that_do_not_fit_are_one_clear_error(
    tmp_path: Path, change: pd.DataFrame, ids: list[str], message: str
) -> None:
    path = tmp_path / "scores.csv"
    change.to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"quality\.scores: scores\.csv: .*{message}"):
        read_external_scores(
            path,
            ids,
            ["quality", "quality_scorer"],
            setting="quality.scores",
            numeric=["quality"],
            named=["quality_scorer"],
        )


def test_text_of_external_scores_is_text_in_either_kind_of_file(tmp_path: Path) -> None:
    table = SCORES.assign(
        quality=["4.5", "3", "1"], quality_scorer=["7", "8", "9"], notes=[[1]] * 3
    )
    table.to_csv(tmp_path / "s.csv", index=False)
    table.to_parquet(tmp_path / "s.parquet")
    columns = ["quality", "quality_scorer"]
    for name in ("s.csv", "s.parquet"):
        read = read_external_scores(
            tmp_path / name, ["z"], columns, setting="s", numeric=columns[:1]
        )
        assert read.iloc[0].tolist() == ["z", 1.0, "9"]
    with pytest.raises(ValueError, match=r"s: s\.parquet: column notes: 1 values are not text"):
        read_external_scores(tmp_path / "s.parquet", ["z"], ["notes"], setting="s")


def test_a_row_of_more_cells_than_headings_is_not_read_askew(tmp_path: Path) -> None:
    # As JSON without quotes makes it.
    (tmp_path / "s.csv").write_text("image_id,quality\nx,1,2\ny,3,4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^s: s\.csv: no table of this kind: "):
        read_external_scores(tmp_path / "s.csv", ["x"], ["quality"], setting="s", complete=False)


@pytest.mark.parametrize("name", ["s.csv", "s.parquet"])
def test_a_score_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe,\n")
    with pytest.raises(ValueError, match=rf"^quality\.scores: {name}: no table of this kind: "):
        read_external_scores(tmp_path / name, ["x"], [], setting="quality.scores")


def test_a_missing_score_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quality\.scores: none\.csv: no such file"):
        read_external_scores(tmp_path / "none.csv", ["x"], [], setting="quality.scores")
