"""Each way against the exact picture: what is measured, and what is said where it is not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from components.evaluation.suites.sampling_ways import (
    WAYS,
    WayResult,
    measure_ways,
    parse_way,
)
from components.evaluation.suites.suites import WAYS_PROMPTS, ways_items
from components.models.loading.sampling_speed import SamplingSpeed


def test_a_way_is_parts_with_numbers():
    way = parse_way("first_block:0.2+fp8")
    assert way.speed == SamplingSpeed(step_cache="first_block", step_cache_threshold=0.2)
    assert (way.quantisation, way.kind) == ("fp8", "approximate")
    assert parse_way("compile+cudnn").kind == "rounding"
    assert parse_way("compile+sage").kind == "approximate"
    assert parse_way("taylorseer:4").speed.step_cache_interval == 4
    assert all(parse_way(name).name == name for name in WAYS)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fast", "'fast' is none of int8"),
        ("int8+nf4", "nf4 and another part say the same"),
        ("fp8:3", "fp8 takes no number"),
        ("first_block:2", "2 is not from 0 to 1"),
        ("taylorseer:1", "1 is not from 2 to 100"),
        ("taylorseer:x", "x is not from"),
    ],
)
def test_bad_ways_are_one_line(text, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        parse_way(text)
    assert "\n" not in str(raised.value)


def test_worst_and_mean_are_of_the_pictures_that_differ():
    row = WayResult("x", "approximate", 32, 48, (30.0, math.inf, 20.0), (0.9, 1.0, 0.5), (3, 1, 2))
    assert row.metrics() == {
        "psnr_worst_db": 20.0,
        "psnr_mean_db": 25.0,
        "ssim_worst": 0.5,
        "ssim_mean": pytest.approx(0.8),
        "seconds_per_image": 2,
        "blocks_computed": 0.0,
        "blocks_total": 0.0,
        "peak_gib": 0.0,
        "equal": 1.0,
        "n": 3.0,
    }
    equal = WayResult("x", "approximate", 32, 48, (math.inf,), (1.0,), (1.0,))
    assert "psnr_worst_db" not in equal.metrics()


def test_prompts_are_the_same_at_every_size():
    items = ways_items(((64, 64), (64, 96)), 3)
    assert [item.prompt for item in items] == [*WAYS_PROMPTS[:3], *WAYS_PROMPTS[:3]]
    assert len({item.id for item in items}) == len({item.seed for item in items}) == 6


class Broken:
    name = "broken"

    def __init__(self, fails):
        self.fails = fails

    def painter_in(self, speed, quantisation):
        def paint(item):
            if self.fails(item, quantisation):
                raise RuntimeError("out of\nmemory")
            return Image.new("RGB", (item.width, item.height), (quantisation != "none",) * 3)

        return paint, torch.nn.Module()


def test_a_size_that_fails_says_why_and_the_others_are_measured():
    items = ways_items(((16, 16), (16, 32)), 2)
    system = Broken(lambda item, kind: kind == "fp8" and item.width == 32)
    rows = measure_ways(system, [parse_way("fp8")], items, device="cpu")
    assert [row.error for row in rows] == [None, None, None, "out of memory"]
    assert rows[2].psnr_db == (pytest.approx(20 * math.log10(255)),) * 2
    with pytest.raises(ValueError, match="broken: the exact picture at 16x16: out of memory"):
        measure_ways(Broken(lambda *_: True), [], items, device="cpu")


def test_the_command_prints_and_stores_what_ways_cost(tmp_path, root, write_trained_weights, typed):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((root / name).read_text())
    write_trained_weights(tmp_path, "ema")
    (weights,) = (tmp_path / "data" / "dit_stage2" / "ema").glob("*.safetensors")
    generator = torch.Generator().manual_seed(3)
    # An untrained network's gates are zero, and nothing in a block reaches the picture.
    state = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in load_file(weights).items()
    }
    save_file(state, weights, {"format": "pt"})
    words = ["runtime", "--system", "ours=trained", "--size", "64x64", "--steps", "6"]
    for way in ("taylorseer:2", "int8", "flash"):
        words += ["--way", way]
    done = typed(tmp_path, "evaluate", *words, "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "flash at 64x64: not measured: generate.attention_backend flash needs a CUDA" in (
        done.stdout
    )
    written = json.loads((tmp_path / "runs/evaluations/runtime/ways.json").read_text())
    exact, taylor, int8, flash = written["ways"]["ours"]
    assert written["prompts"] == list(WAYS_PROMPTS[:2])
    assert (exact["equal"], exact["n"], exact["ssim_worst"]) == (2.0, 2.0, 1.0)
    # Six passes of two blocks, for two pictures.
    assert (exact["blocks_computed"], exact["blocks_total"]) == (24.0, 24.0)
    # Computed: 0 1 2 4.
    assert (taylor["blocks_computed"], taylor["blocks_total"]) == (16.0, 24.0)
    assert int8["blocks_computed"] == 24.0
    assert 20 < int8["psnr_worst_db"] <= int8["psnr_mean_db"]
    assert flash["error"] is not None
    assert "psnr_worst_db" not in flash
    # The printed blocks are those of the file.
    assert "16 of 24" in done.stdout
