"""Closed forms against FlopCounterMode on the real classes, without storage or with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.backbones import BACKBONES
from components.planning.counted_flops import backbone_call, count, flux_call, flux_on_meta
from components.planning.flops import (
    Flops,
    clip_flops,
    decoder_products,
    encoder_products,
    flux_flops,
    mean_flops,
    parameters,
    t5_flops,
    total,
)
from components.planning.model_shapes import (
    AutoencoderShape,
    ClipShape,
    FluxShape,
    T5Shape,
)

FLUX_DEV = FluxShape()


def autoencoder_on_meta(shape: AutoencoderShape, groups: int = 32) -> AutoencoderKLF16:
    levels = len(shape.block_out_channels)
    with torch.device("meta"):
        return AutoencoderKLF16(
            **vars(shape),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=groups,
        )


@pytest.fixture(scope="module")
def flux_dev():
    return flux_on_meta(FLUX_DEV)


def test_the_12b_transformer_at_4096_px_costs_what_torch_counts(flux_dev):
    counted = count(flux_call(flux_dev, (128, 128), 512))
    assert flux_flops(FLUX_DEV, 128 * 128, 512) == counted
    assert round(counted.forward / 1e12) == 418
    assert round(counted.model / 1e12) == 1254
    assert sum(p.numel() for p in flux_dev.parameters()) == FLUX_DEV.parameters == 11_901_408_320


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(84, 196), (198, 82)])
def test_other_buckets_of_the_12b_transformer_cost_what_torch_counts(flux_dev, grid):
    with torch.no_grad():
        counted = count(flux_call(flux_dev, grid, 512), backward=False)
    assert flux_flops(FLUX_DEV, grid[0] * grid[1], 512).forward == counted.forward


@pytest.mark.slow
def test_checkpointing_of_the_12b_transformer_repeats_what_torch_counts():
    model = flux_on_meta(FLUX_DEV)
    model.enable_gradient_checkpointing()
    for grid in ((128, 128), (84, 196), (90, 182)):
        counted = count(flux_call(model, grid, 512))
        closed = flux_flops(FLUX_DEV, grid[0] * grid[1], 512, checkpointing=True)
        assert closed.total == counted.total


@settings(max_examples=3)
@given(
    layers=st.tuples(st.integers(0, 2), st.integers(1, 2)),
    heads=st.integers(1, 3),
    head=st.sampled_from([16, 24, 32]),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    text=st.integers(1, 9),
    batch=st.integers(1, 3),
    guidance=st.booleans(),
    checkpointing=st.booleans(),
)
def test_any_flux_shape_costs_what_torch_counts(
    layers, heads, head, widths, grid, text, batch, guidance, checkpointing
):
    shape = FluxShape(
        *layers,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=widths[0],
        pooled_projection_dim=widths[1],
        in_channels=4 * widths[2],
        guidance_embeds=guidance,
    )
    model = flux_on_meta(shape)
    if checkpointing:
        model.enable_gradient_checkpointing()
    counted = count(flux_call(model, grid, text, batch))
    closed = flux_flops(shape, grid[0] * grid[1], text, batch, checkpointing=checkpointing)
    assert (closed.forward, closed.total) == (counted.forward, counted.total)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_a_real_backward_pass_on_the_cpu_adds_the_fused_kernels_fifth_product():
    shape = FluxShape(2, 3, 32, 2, joint_attention_dim=24, pooled_projection_dim=20, in_channels=16)
    model = flux_on_meta(shape, torch.float32).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens, text = 6 * 8, 5
    with FlopCounterMode(display=False) as counter:
        output = model(
            hidden_states=torch.randn(2, tokens, 16),
            encoder_hidden_states=torch.randn(2, text, 24),
            pooled_projections=torch.randn(2, 20),
            timestep=torch.rand(2),
            guidance=torch.ones(2),
            grid_hw=(6, 8),
        ).sample
        forward = counter.get_total_flops()
        output.square().mean().backward()
    operators = counter.get_flop_counts()["Global"]
    fused = any("flash" in str(operator) for operator in operators)
    closed = flux_flops(shape, tokens, text, 2, fused_attention=fused)
    assert (forward, counter.get_total_flops()) == (closed.forward, closed.model)
    # Nearly two backward operations for a forward one: embedders need no input gradient.
    plain = flux_flops(shape, tokens, text, 2)
    assert 1.95 < plain.backward / plain.forward < 2.0


@pytest.mark.parametrize(
    "mode", ["official_partitioned", pytest.param("aligned", marks=pytest.mark.slow)]
)
def test_the_f16_autoencoder_at_4096_px_costs_what_torch_counts(mode):
    shape = AutoencoderShape(decode_mode=mode)
    model = autoencoder_on_meta(shape)
    image = torch.empty(1, 3, 4096, 4096, device="meta")
    latents = torch.empty(1, 16, 256, 256, device="meta")
    encoder, decoder = encoder_products(shape, 4096, 4096), decoder_products(shape, 4096, 4096)
    with torch.no_grad():
        encoded = count(lambda: model.encode(image).latent_dist.mode(), backward=False)
    assert total(encoder).forward == encoded.forward
    assert total(decoder) == count(lambda: model.decode(latents).sample)
    assert round(encoded.forward / 1e12) == 26
    assert round(total(decoder).forward / 1e12) == 49
    assert parameters(encoder) == sum(p.numel() for p in model.encoder.parameters())
    assert parameters(decoder) == sum(p.numel() for p in model.decoder.parameters())


@settings(max_examples=3)
@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=4),
    layers=st.integers(1, 2),
    latent=st.integers(1, 5),
    size=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    batch=st.integers(1, 2),
    stride=st.sampled_from([1, 2]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_any_autoencoder_shape_costs_what_torch_counts(
    widths, layers, latent, size, batch, stride, flags
):
    quant, attention, partitioned, checkpointing = flags
    shape = AutoencoderShape(
        tuple(widths),
        layers,
        latent,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
        stride=stride,
        decode_mode="official_partitioned" if partitioned else "aligned",
    )
    model = autoencoder_on_meta(shape, groups=4).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    height, width = (edge * shape.compression for edge in size)
    image = torch.empty(batch, 3, height, width, device="meta")
    latents = torch.empty(batch, latent, *size, device="meta")
    encoder = encoder_products(shape, height, width, batch)
    with torch.no_grad():
        encoded = count(lambda: model.encode(image).latent_dist.mode(), backward=False)
    assert total(encoder).forward == encoded.forward
    decoder = decoder_products(shape, height, width, batch)
    closed, counted = (
        total(decoder, checkpointing=checkpointing),
        count(lambda: model.decode(latents).sample),
    )
    assert (closed.forward, closed.total) == (counted.forward, counted.total)
    held = sum(p.numel() for p in model.parameters())
    assert parameters(encoder) + parameters(decoder) == held


def test_flux_text_encoders_cost_what_torch_counts():
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
    ids = torch.zeros(2, 512, dtype=torch.long, device="meta")
    words = torch.zeros(2, 77, dtype=torch.long, device="meta")
    with torch.no_grad():
        counted = count(lambda: t5(ids)[0], backward=False)
        read = count(lambda: clip(words).last_hidden_state, backward=False)
    assert t5_flops(T5Shape(), 512, 2) == counted
    assert clip_flops(ClipShape(), 2) == read
    assert sum(p.numel() for p in t5.parameters()) == T5Shape().parameters
    assert sum(p.numel() for p in clip.parameters()) == ClipShape().parameters


def test_sd3_is_counted_on_the_meta_device_beyond_its_own_position_table():
    sd3 = BACKBONES["sd3"]
    with torch.device("meta"):
        model = sd3.from_config({**sd3.published_config, "num_layers": 2}, (512, 64))
    parts = [count(backbone_call(sd3, model, (512, 64), 333, batch)).model for batch in (1, 2)]
    assert parts[0] > 0
    assert parts[1] == 2 * parts[0]


def test_passes_add_multiply_and_average():
    one = Flops(2, 4, 1)
    assert one + one == one * 2
    assert (one.model, one.total, one.inference) == (6, 7, Flops(2))
    assert mean_flops([one, one * 3]) == one * 2
