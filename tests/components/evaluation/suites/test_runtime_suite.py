"""Timing of systems: what is counted, what is stated, and what cannot be timed."""

from __future__ import annotations

import inspect
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from components.evaluation.suites.runtime_suite import (
    Timing,
    runtime_metrics,
    time_pictures,
    time_systems,
    write_runtime,
)
from components.evaluation.suites.step_clock import PipelinePaint
from components.evaluation.suites.suites import SuiteItem, load_suite, runtime_items
from components.evaluation.suites.system import Sampling
from components.evaluation.suites.systems import FolderSystem, PipelineSystem

ITEM = SuiteItem("a", "a lake", 32, 48, 1)


def test_warm_up_is_timed_apart_and_every_repeat_is_kept() -> None:
    calls: list[SuiteItem] = []

    def paint(item: SuiteItem) -> Image.Image:
        calls.append(item)
        time.sleep(0.01 if len(calls) > 2 else 0.0)
        return Image.new("RGB", (item.width, item.height))

    timing = time_pictures(paint, ITEM, "mine", warm_up=2, repeats=3, device="cpu")
    assert calls == [ITEM] * 5
    assert (len(timing.warm_up_s), len(timing.seconds)) == (2, 3)
    assert min(timing.seconds) >= 0.01
    assert timing.peak_bytes > 0
    assert timing.error is None


def test_the_peak_holds_what_a_picture_allocates() -> None:
    def paint(item: SuiteItem) -> Image.Image:
        held = bytearray(200 * 2**20)
        held[:: 2**12] = b"x" * (len(held) // 2**12)
        return Image.new("RGB", (item.width, item.height))

    small = time_pictures(
        lambda item: Image.new("RGB", (8, 8)), ITEM, "a", warm_up=0, repeats=1, device="cpu"
    )
    large = time_pictures(paint, ITEM, "b", warm_up=0, repeats=1, device="cpu")
    assert large.peak_bytes - small.peak_bytes > 150 * 2**20


def test_steps_are_timed_between_the_schedulers_steps_and_nothing_else_is() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    before = inspect.signature(scheduler.step)

    def make(item: SuiteItem) -> Image.Image:
        scheduler.set_timesteps(4)
        assert inspect.signature(scheduler.step) == before
        time.sleep(0.2)
        latents = torch.zeros(1, 4)
        for timestep in scheduler.timesteps:
            time.sleep(0.01)
            latents = scheduler.step(latents, timestep, latents).prev_sample
        time.sleep(0.2)
        return Image.new("RGB", (item.width, item.height))

    paint = PipelinePaint(SimpleNamespace(scheduler=scheduler), make)
    timing = time_pictures(paint, ITEM, "mine", warm_up=1, repeats=2, device="cpu")
    # Three differences of four steps, of each of two pictures: the warm-up is not among them.
    assert len(timing.step_s) == 6
    assert 0.01 <= statistics.median(timing.step_s) < 0.2
    assert "step" not in vars(scheduler)


def test_a_size_that_fails_keeps_its_reason_and_what_was_measured() -> None:
    calls: list[int] = []

    def paint(item: SuiteItem) -> Image.Image:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of\nmemory")
        return Image.new("RGB", (8, 8))

    timing = time_pictures(paint, ITEM, "mine", warm_up=1, repeats=5, device="cpu")
    assert timing.error == "out of memory"
    assert len(timing.seconds) == 1


def test_the_metrics_are_the_median_its_inverse_and_the_spread(tmp_path: Path) -> None:
    timing = Timing("mine", 32, 48, 0.5, (9.0,), (4.0, 1.0, 2.0), 3 * 2**30, step_s=(0.5, 0.1, 0.2))
    failed = Timing("mine", 64, 64, error="out of memory")
    metrics = runtime_metrics([timing, failed])
    assert metrics == {
        "mine.48x32.seconds_per_image": 2.0,
        "mine.48x32.seconds_min": 1.0,
        "mine.48x32.seconds_max": 4.0,
        "mine.48x32.images_per_second": 0.5,
        "mine.48x32.peak_gib": 3.0,
        "mine.48x32.peak_gb": 3.221225472,
        "mine.48x32.seconds_per_step": 0.2,
        "mine.48x32.n": 3.0,
    }
    path = tmp_path / "out" / "runtime.json"
    write_runtime([timing, failed], {"other": "no weights"}, "cpu", path, repeats=3)
    written = json.loads(path.read_text())
    assert written["machine"]["cpu"]
    assert written["asked"] == {"repeats": 3}
    assert written["timings"][0]["warm_up_s"] == [9.0]
    assert written["failed_systems"] == {"other": "no weights"}
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"] == metrics


def test_the_suite_is_one_of_the_named_ones(tmp_path: Path) -> None:
    suite = load_suite("runtime", tmp_path)
    assert suite.items == runtime_items()
    assert {item.stratum for item in suite.items} == {"2048x2048", "4096x4096", "5120x2880"}


def test_what_has_no_time_per_picture_or_no_weights_says_so(tmp_path: Path) -> None:
    systems = [
        FolderSystem("folder", tmp_path),
        PipelineSystem("none", tmp_path / "none", Sampling(), "hf download none"),
    ]
    timings, failed = time_systems(systems, [ITEM], repeats=1)
    assert timings == []
    assert "no time per picture" in failed["folder"]
    assert "hf download none" in failed["none"]


@pytest.mark.slow
def test_a_pipeline_is_timed_in_a_process_of_its_own(flux: Path) -> None:
    system = PipelineSystem("flux", flux, Sampling(num_inference_steps=1))
    items = runtime_items(((32, 48), (48, 32)))
    timings, failed = time_systems([system], items, repeats=2)
    assert failed == {}
    assert [timing.size for timing in timings] == ["48x32", "32x48"]
    for timing in timings:
        assert timing.error is None
        assert (len(timing.warm_up_s), len(timing.seconds)) == (1, 2)
        assert timing.load_s > 0
        # One denoising step has no step before it.
        assert timing.step_s == ()
        assert timing.peak_bytes > 2**26
