"""Short cuts of sampling: refused where they cannot run, exact where they are off, counted."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch

from components.models.loading.memory_modes import parse_memory, place_pipeline
from components.models.loading.sampling_speed import (
    _DISPATCHED,
    SamplingSpeed,
    counted_blocks,
    forget_steps,
    speed_up,
)
from components.models.pipeline import UltraFluxPipeline
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer

STEPS, BLOCKS = 10, 4


@pytest.fixture(scope="module")
def parts():
    model = build_tiny_transformer(num_layers=2, num_single_layers=2, rope_window=4, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        # An untrained network's gates are zero, and its velocity does not move.
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return build_tiny_autoencoder(), model


def pipeline(parts, speed, memory="none"):
    vae, transformer = copy.deepcopy(parts)
    made = UltraFluxPipeline.from_components(vae, transformer)
    made.set_progress_bar_config(disable=True)
    speed_up(transformer, speed)
    place_pipeline(made, parse_memory(memory), "cpu")
    return made


def paint(made, seed, height=64):
    generator = torch.Generator().manual_seed(seed)
    forget_steps(made.transformer)
    return made(
        prompt_embeds=torch.randn(1, 8, 64, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 64, generator=generator),
        height=height,
        width=64,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images


@pytest.fixture(scope="module")
def exact(parts):
    made = pipeline(parts, SamplingSpeed())
    with counted_blocks(made.transformer) as count:
        picture = paint(made, 1)
    assert (count.computed, count.total) == (STEPS * BLOCKS, STEPS * BLOCKS)
    return picture


def test_taylorseer_computes_the_steps_that_its_schedule_says(parts, exact):
    made = pipeline(parts, SamplingSpeed(step_cache="taylorseer", step_cache_interval=3))
    with counted_blocks(made.transformer) as count:
        picture = paint(made, 1)
    # The first three, and every third from the fifth on: 0 1 2 4 7.
    assert (count.computed, count.total) == (5 * BLOCKS, STEPS * BLOCKS)
    assert 0 < np.abs(picture - exact).max() < 0.2
    rarer = pipeline(parts, SamplingSpeed(step_cache="taylorseer", step_cache_interval=5))
    assert np.square(paint(rarer, 1) - exact).mean() > np.square(picture - exact).mean()


def test_the_first_block_decides_whether_the_others_are_computed(parts, exact):
    # A threshold that no change reaches, and one that every change is above.
    low = pipeline(parts, SamplingSpeed(step_cache="first_block", step_cache_threshold=1e-9))
    with counted_blocks(low.transformer) as count:
        picture = paint(low, 1)
    assert count.computed == count.total
    assert np.array_equal(picture, exact)
    high = pipeline(parts, SamplingSpeed(step_cache="first_block", step_cache_threshold=1.0))
    with counted_blocks(high.transformer) as count:
        picture = paint(high, 1)
    # Whole once, then the first block alone.
    assert count.computed == BLOCKS + STEPS - 1
    assert not np.array_equal(picture, exact)


@pytest.mark.parametrize("cache", ["first_block", "taylorseer"])
def test_a_cached_picture_depends_on_no_other_and_not_on_where_blocks_wait(parts, cache):
    speed = SamplingSpeed(step_cache=cache, step_cache_threshold=0.1)
    alone = paint(pipeline(parts, speed), 2)
    made = pipeline(parts, speed, "block-offload")
    for height in (64, 96):
        paint(made, 1, height)
    with torch.no_grad(), made.transformer.cache_context("cond"):
        # A picture that was broken off.
        made.transformer(
            torch.zeros(1, 4, 64),
            encoder_hidden_states=torch.zeros(1, 8, 64),
            pooled_projections=torch.zeros(1, 64),
            timestep=torch.ones(1),
            guidance=torch.ones(1),
            grid_hw=(2, 2),
        )
    assert np.array_equal(paint(made, 2), alone)


@pytest.mark.slow
def test_compiled_blocks_differ_by_rounding_also_where_they_are_offloaded(parts, exact):
    compiled = paint(pipeline(parts, SamplingSpeed(compile="blocks")), 1)
    assert 0 < np.abs(compiled - exact).max() < 1e-4
    offloaded = paint(pipeline(parts, SamplingSpeed(compile="blocks"), "block-offload"), 1)
    assert np.abs(offloaded - exact).max() < 1e-4


@pytest.mark.parametrize(
    ("speed", "device", "dtype", "problem"),
    [
        ({"attention_backend": "flash"}, "cpu", "bfloat16", "a CUDA GPU .* flash-attn"),
        ({"attention_backend": "sage"}, "cuda", "bfloat16", "pip install sageattention"),
        ({"attention_backend": "flash_3"}, "cuda:0", "float16", "needs FlashAttention 3"),
        ({"attention_backend": "cudnn"}, "cuda", "float32", "needs dtype bfloat16"),
        ({"attention_backend": "cudnn"}, "cpu", "bfloat16", r"needs a CUDA GPU \(the device is"),
        ({"compile": "blocks", "step_cache": "taylorseer"}, "cuda", "bfloat16", "choose one"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(speed, device, dtype, problem):
    for package in ("flash_attn", "flash_attn_interface", "sageattention"):
        assert importlib.util.find_spec(package) is None
    with pytest.raises(ValueError, match=problem) as raised:
        SamplingSpeed(**speed).check(device, dtype)
    assert "\n" not in str(raised.value)


def test_what_runs_everywhere_is_not_refused():
    SamplingSpeed().check("cpu", "float32")
    SamplingSpeed(attention_backend="cudnn").check("cuda:0", "bfloat16")
    SamplingSpeed(step_cache="first_block").check("cpu", "float32")


def test_back_ends_go_through_the_dispatcher_of_this_network_alone(parts):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = {one.value for one in _AttentionBackendRegistry.list_backends()}
    assert set(_DISPATCHED.values()) <= known
    model = copy.deepcopy(parts[1])
    speed_up(model, SamplingSpeed(attention_backend="cudnn"))
    chosen = {one._attention_backend for one in model.attn_processors.values()}
    assert chosen == {AttentionBackendName._NATIVE_CUDNN}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    # Where a package is missing or too old, diffusers' reason is one line.
    with pytest.raises(ValueError, match=r"attention_backend flash: .*flash-attn"):
        speed_up(model, SamplingSpeed(attention_backend="flash"))


def test_a_backbone_without_caches_or_dispatcher_says_so(tiny_backbone):
    model = tiny_backbone("sd3")
    for speed in ({"step_cache": "first_block"}, {"attention_backend": "cudnn"}):
        with pytest.raises(ValueError, match="SD3Transformer2DModel"):
            speed_up(model, SamplingSpeed(**speed))


def test_only_what_is_on_belongs_to_a_pictures_identity():
    assert SamplingSpeed(step_cache_threshold=0.3).deciding() == {}
    assert SamplingSpeed(step_cache="first_block", step_cache_interval=7).deciding() == {
        "step_cache": "first_block",
        "step_cache_threshold": 0.05,
    }
    assert SamplingSpeed(attention_backend="cudnn", compile="blocks").deciding() == {
        "attention_backend": "cudnn",
        "compile": "blocks",
    }
