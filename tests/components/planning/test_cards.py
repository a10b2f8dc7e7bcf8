from __future__ import annotations

import dataclasses

import pytest

from components.planning import exact
from components.planning.cards import card_rows
from components.planning.model_shapes import FluxShape, networks
from components.planning.planner import plan
from components.planning.rounded import saved_bytes
from components.planning.stage_memory import dit_memory, sampling_bytes, stage_memory
from components.planning.transformer import Transformer

GIB = 2**30
QUANTISATION = "models__transformer__quantisation"


@pytest.fixture
def subject(profile, tmp_path):
    def make(name="single-gpu", **changes):
        settings = profile(name, **changes)
        return Transformer(networks(settings, tmp_path), settings)

    return make


def test_planned_numbers_of_the_12b_network_at_4096_px(subject):
    """In each case the trace is 2 to 3% below (slow to make: docs/plan.md)."""

    def training(kind):
        made = subject(**{QUANTISATION: kind})
        return dit_memory(made.settings.dit_stage1, made, [(4096, 4096)], 1).total / GIB

    # Within what a 24 GB card has, 22.5 and 17 GiB.
    # 11.4e9 weights in blocks: 2 bytes, 1 byte, and half a byte with scales.
    assert training("none") == pytest.approx(32.6, abs=0.1)
    assert training("int8") == pytest.approx(22.24, abs=0.1)
    assert training("nf4") == pytest.approx(16.78, abs=0.1)

    def sampling(*memory):
        made = subject(generate__memory=list(memory))
        return stage_memory("generate", made, [(4096, 4096)]).gpu_bytes / GIB

    assert sampling("text-first", "block-offload") < 8
    assert sampling("text-first", "block-offload", "vae-tiling") < 4
    assert sampling("text-first") > 22


def test_the_24_gb_profile_leaves_a_gib_and_a_half(profile, tmp_path):
    made = plan(profile("consumer-24gb"), tmp_path, 1000, limit=24 * GIB)
    assert made.warnings == ()
    for stage in made.stages:
        assert stage.memory_bytes <= 22.5 * GIB, stage.stage


def test_every_card_and_edge_has_a_row_and_larger_cards_lose_less(subject):
    rows = list(card_rows(subject()))
    assert len(rows) == 2 * 3 * 6
    at_4096 = {(row.work, row.card_gb): row for row in rows if row.edge_px == 4096}
    assert at_4096["training", 8].verdict == "fits"
    assert at_4096["training", 8].error == "exact"
    assert at_4096["training", 8].changes == {
        "dit_stage1.offload_activations": True,
        "dit_stage1.offload_base": True,
    }
    assert at_4096["training", 24].changes == {
        "models.transformer.quantisation": "int8",
        "dit_stage1.offload_activations": True,
    }
    assert "1%" in at_4096["training", 24].error
    assert at_4096["training", 48].changes == {}
    assert at_4096["training", 48].error == at_4096["sampling", 8].error == "exact"
    for row in rows:
        fits = row.needed_bytes + GIB + row.needed_bytes // 20 <= row.card_gb * GIB
        assert fits == (row.verdict == "fits")


def test_guidance_against_a_prompt_is_planned_for_two(subject):
    changes = {"models__transformer__backbone": "sd3"}
    size = (1024, 1024)
    with_it = sampling_bytes(subject(**changes, generate__guidance_scale=4.0), size, 2)
    without = sampling_bytes(subject(**changes, generate__guidance_scale=1.0), size, 2)
    assert 1.8 < with_it / without < 2.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_a_trace_holds_the_rounded_weights_that_are_planned(subject, kind):
    def traced(quantisation):
        whole = subject(**{QUANTISATION: quantisation})
        # A block's weights are widened for its products: one alone saves less than that.
        nets = dataclasses.replace(whole.networks, transformer=FluxShape(2, 2))
        small = Transformer(nets, whole.settings)
        return small, exact.trace_training(small, "dit_stage1", (512, 512))[0]

    _, plain = traced("none")
    rounded, trace = traced(kind)
    saved = saved_bytes(rounded, kind, 2)
    assert plain.held_bytes - trace.held_bytes == pytest.approx(saved, rel=0.002)
    assert trace.peak_bytes < plain.peak_bytes
    planned = stage_memory("dit_stage1", rounded, [(512, 512)]).memory.total
    # Frozen layers keep less, which few blocks show most: an upper bound.
    assert 0.97 < planned / trace.peak_bytes < 1.4
