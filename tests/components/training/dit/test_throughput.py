"""Cost of a step: operations against the closed form, and waiting for data."""

from __future__ import annotations

import pytest
import torch

from components.models.tiny import build_tiny_transformer
from components.objectives.flow_matching import flow_matching_loss
from components.planning.counted_flops import count, flux_call, flux_on_meta
from components.planning.flops import flux_flops
from components.planning.model_shapes import FluxShape
from components.training.dit.throughput import WAIT_WARNING, DataWait, Throughput, model_flops
from components.training.dit.velocity import NoisedBatch, band_errors

DOUBLE, SINGLE, HEADS, HEAD, TEXT, POOLED = 1, 2, 2, 32, 24, 20


def batch(height: int = 8, width: int = 12, count: int = 3) -> NoisedBatch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return NoisedBatch(
        tuple("abc"[:count]),
        normal(count, 16, height, width),
        normal(count, 16, height, width),
        torch.linspace(0.1, 0.9, count),
        normal(count, 7, TEXT),
        normal(count, POOLED),
    )


@pytest.fixture(scope="module")
def transformer():
    return build_tiny_transformer(
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        num_attention_heads=HEADS,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        in_channels=64,
        guidance_embeds=True,
        rope_variant="official",
        rope_window=64,
        seed=0,
    )


def test_model_flops_are_those_of_the_matrix_products(transformer) -> None:
    image, text, d = 4 * 6, 7, HEADS * HEAD
    tokens = image + text
    attention = 4 * tokens**2 * d
    double = 2 * 12 * d * d + tokens * (8 * d * d + 16 * d * d) + attention
    single = 2 * 3 * d * d + tokens * (6 * d * d + 8 * d * d + 10 * d * d) + attention
    inputs = 2 * image * 64 * d + 2 * text * TEXT * d + 2 * 2 * 256 * d + 2 * POOLED * d
    rest = 3 * 2 * d * d + 4 * d * d + 2 * image * d * 64
    blocks = DOUBLE * double + SINGLE * single
    # Products with data need no gradient of their input: one product backward instead of two.
    assert model_flops(transformer, batch()) == 3 * (blocks + rest) + 2 * inputs


def test_the_live_count_is_the_planners_closed_form_and_torchs_own_count(transformer) -> None:
    shape = FluxShape(
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
    )
    for height, width in ((8, 12), (16, 6), (10, 10)):
        grid = (height // 2, width // 2)
        live = model_flops(transformer, batch(height, width))
        assert live == flux_flops(shape, grid[0] * grid[1], 7).model
        assert live == count(flux_call(flux_on_meta(shape), grid, 7)).model


def test_the_mean_of_the_band_errors_is_the_flow_matching_loss() -> None:
    data = batch()
    velocity = data.noise * 0.3
    bands = band_errors(velocity, data)
    assert [tuple(band.shape) for band in bands] == [(3,)] * 4
    loss = flow_matching_loss(velocity, data.latents, data.noise)
    torch.testing.assert_close(torch.stack(bands).mean(0), loss)
    constant = NoisedBatch(
        ("a",), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), *(data.t[:1],) * 3
    )
    ll, *rest = band_errors(torch.ones(1, 1, 4, 4), constant)
    assert float(ll) == 4.0
    assert [float(band) for band in rest] == [0.0] * 3


def test_long_waiting_is_reported_once_each_time_it_begins() -> None:
    wait = DataWait(window=4, limit=0.05)
    calm, slow = (1.0, 0.01), (1.0, 0.5)
    assert [wait.add(*slow) for _ in range(6)] == [False, False, False, True, False, False]
    assert wait.share == pytest.approx(0.5)
    assert not any(wait.add(*calm) for _ in range(6))
    assert [wait.add(*slow) for _ in range(3)] == [True, False, False]


def test_waiting_for_just_the_limit_is_not_reported() -> None:
    wait = DataWait(window=2, limit=0.25)
    assert [wait.add(1.0, 0.25) for _ in range(3)] == [False, False, False]
    assert wait.add(1.0, 0.5)


def test_a_step_says_what_it_cost_and_mfu_only_with_a_known_peak(transformer, capsys) -> None:
    data = batch()
    options = {"images_per_step": 6, "world_size": 2, "memory_every": 2}
    silent = Throughput("dit_stage1", transformer, peak_tflops=None, **options)
    values = silent.measure(1, 0.5, 0.1, data)
    assert values["images_per_s"] == 12
    expected = model_flops(transformer, data) * 6 / 0.5 / 2 / 1e12
    assert values["model_tflops_per_s"] == pytest.approx(expected)
    assert "mfu" not in values
    assert "rss_gib" not in values
    assert silent.measure(2, 0.5, 0.0, data)["rss_gib"] > 0
    known = Throughput("dit_stage1", transformer, peak_tflops=expected * 4, **options)
    assert known.measure(1, 0.5, 0.1, data)["mfu"] == pytest.approx(0.25)
    assert capsys.readouterr().err == ""
    rows = [known.measure(step, 0.5, 0.1, data) for step in range(2, 60)]
    assert sum(WAIT_WARNING in row for row in rows) == 1
    said = capsys.readouterr().err
    assert said.count("waiting for data takes 20%") == said.count("\n") == 1
