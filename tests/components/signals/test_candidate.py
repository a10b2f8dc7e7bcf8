from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.images.decoding import read_rgb
from components.signals.candidate import (
    CANDIDATE_SCHEMA,
    Candidate,
    derivative_jpeg,
    measure_candidate,
    measure_image,
)

ROOT = Path(__file__).parents[3]
KEYS = [
    "path",
    "width",
    "height",
    "entropy_bits",
    "flat_fraction",
    "glcm_score",
    "glcm_entropy_bits",
    "jpeg95_ratio",
    "upright_width",
    "upright_height",
    "orientation",
    "color_space",
    "bit_depth",
    "alpha_fraction",
]
MEASURES = KEYS[1:7]


def candidate(path: Path) -> Candidate:
    return Candidate(path, patch_px=240, flat_variance=800.0, derivative_px=256, max_megapixels=400)


def test_measure_image_gives_the_official_values_under_the_stable_keys() -> None:
    path = ROOT / "data" / "sample" / "galen-crout-175291.jpg"
    with (ROOT / "tests" / "reference" / "signals.csv").open() as file:
        expected = next(row for row in csv.DictReader(file) if row["file"] == path.name)
    row = measure_image(path)
    assert list(row) == KEYS
    assert row["path"] == str(path)
    assert (row["width"], row["height"]) == (2768, 1560)
    assert row["entropy_bits"] == float(expected["shannon_entropy"])
    assert row["flat_fraction"] == float(expected["flat_percentage"])
    assert row["glcm_score"] == pytest.approx(float(expected["glcm_score"]), abs=1e-12)
    assert row["jpeg95_ratio"] > 1
    assert (row["upright_width"], row["upright_height"], row["orientation"]) == (2768, 1560, 1)
    assert (row["color_space"], row["bit_depth"], row["alpha_fraction"]) == ("sRGB", 8, 0.0)


def test_what_is_not_measurable_is_null_with_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    row = measure_image(bad)
    assert list(row) == [*KEYS, "error"]
    assert [row[key] for key in KEYS[1:]] == [None] * 13
    Image.new("RGB", (50, 50)).save(tmp_path / "small.png")
    small = measure_image(tmp_path / "small.png")
    assert small["glcm_score"] is None
    assert small["error"] == "GLCM: no 64x64 patch fits"
    assert small["entropy_bits"] == 0.0


def test_a_candidate_row_fits_the_schema_and_agrees_with_measure_image() -> None:
    path = ROOT / "data" / "sample" / "ng-32703.jpg"
    row = measure_candidate(candidate(path))
    assert set(row) <= set(CANDIDATE_SCHEMA.names)
    reference = measure_image(path)
    for key in MEASURES:
        assert row[key] == reference[key]
    assert set(CANDIDATE_SCHEMA.names) - set(row) == {"image_id", "error"}
    assert row["jpeg_quality"] == 90
    assert len(row["pdq_hash"]) == 64
    assert row["pdq_quality"] > 50
    assert row["integrity"] == "ok"
    assert row["bytes_per_pixel"] == path.stat().st_size / 6e6
    with Image.open(io.BytesIO(row["jpeg"])) as derivative:
        assert derivative.size == (250, 167)


def test_glcm_can_be_left_out_and_other_formats_have_no_jpeg_quality(tmp_path: Path) -> None:
    path = ROOT / "data" / "sample" / "galen-crout-175291.jpg"
    full = measure_candidate(candidate(path))
    quick = measure_candidate(dataclasses.replace(candidate(path), glcm=False))
    assert (quick["glcm_score"], quick["glcm_entropy_bits"]) == (None, None)
    assert {**quick, "glcm_score": 0, "glcm_entropy_bits": 0} == {
        **full,
        "glcm_score": 0,
        "glcm_entropy_bits": 0,
    }
    with Image.open(path) as image:
        image.save(tmp_path / "same.png", compress_level=1)
    png = measure_candidate(candidate(tmp_path / "same.png"))
    assert png["jpeg_quality"] is None
    differing = {key for key in full if full[key] != png[key]}
    assert differing == {"bytes_per_pixel", "jpeg_quality"}


def test_the_derivative_is_the_box_reduction_of_pil() -> None:
    pixels = read_rgb(ROOT / "data" / "sample" / "ng-32703.jpg").pixels
    with Image.open(io.BytesIO(derivative_jpeg(pixels, 512))) as image:
        found = np.asarray(image, np.float64)
    buffer = io.BytesIO()
    # 3000 / 512, rounded up.
    Image.fromarray(pixels).reduce(6).save(buffer, "JPEG", quality=90)
    with Image.open(buffer) as image:
        expected = np.asarray(image, np.float64)
    assert found.shape == expected.shape
    assert 10 * np.log10(255**2 / ((found - expected) ** 2).mean()) > 50


def test_a_row_holds_the_same_derivative_as_the_function_makes() -> None:
    path = ROOT / "data" / "sample" / "galen-crout-175291.jpg"
    row = measure_candidate(dataclasses.replace(candidate(path), glcm=False))
    assert row["jpeg"] == derivative_jpeg(read_rgb(path).pixels, 256)


def test_a_broken_candidate_says_why_and_has_no_derivative(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    assert measure_candidate(candidate(tmp_path / "x.jpg")) == {"integrity": "empty file (0 bytes)"}
    gone = measure_candidate(candidate(tmp_path / "gone.jpg"))
    assert gone == {"integrity": "cannot read: No such file or directory"}


@pytest.mark.parametrize(
    ("shape", "expected"), [((300, 100), (100, 34)), ((100, 90), (100, 90)), ((4000, 1), (125, 1))]
)
def test_a_derivative_keeps_the_shape_and_is_never_enlarged(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = derivative_jpeg(np.zeros((*shape, 3), np.uint8), 128)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.height, image.width) == expected
