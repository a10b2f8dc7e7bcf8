"""Saved diffusers pipelines of the true classes as systems under test, tiny and random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from components.evaluation.suites import SuiteItem
from components.evaluation.systems import PipelineSystem, Sampling

ITEMS = [SuiteItem("a", "a lake", 32, 48, 1), SuiteItem("b", "a hill", 48, 32, 2)]


@pytest.mark.slow
def test_a_flux_pipeline_makes_each_picture_once_and_anew_for_other_settings(
    flux: Path, tmp_path: Path
) -> None:
    system = PipelineSystem("flux", flux, Sampling(num_inference_steps=2))
    paths = system.pictures(ITEMS, tmp_path)
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(48, 32), (32, 48)]
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    kept_at = paths[1].stat().st_mtime_ns
    assert system.pictures(ITEMS, tmp_path) == paths
    assert [path.read_bytes() for path in paths] == before
    assert paths[1].stat().st_mtime_ns == kept_at
    other = replace(system, sampling=Sampling(num_inference_steps=3))
    other.pictures(ITEMS[:1], tmp_path)
    assert paths[0].read_bytes() != before[0]
