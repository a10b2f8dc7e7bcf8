from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from components.models.backbones import backbone_of
from components.models.loading import quantisation
from components.models.loading.block_offload import end_offload, offload_blocks, offload_layers
from components.models.loading.memory_modes import parse_memory
from components.models.loading.quantisation import (
    QuantisationUnavailable,
    is_quantised,
    quantise,
    stored_bytes,
    training_problem,
)
from components.models.tiny import build_tiny_transformer
from components.settings.schema import load_settings
from components.settings.training import AdapterSettings
from components.training.adapters.base_rounding import relative_rms, velocities


def random_flux():
    """Small, and no gate of it is zero: an error anywhere reaches the velocity."""
    model = build_tiny_transformer(num_layers=2, num_single_layers=2, rope_window=4, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        # The spread of FLUX.1's matrices.
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def flux():
    return random_flux()


def at_eight_levels(model):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    texts = (torch.randn(1, 8, 64, generator=generator), torch.randn(1, 64, generator=generator))
    return velocities(model, latents, texts, seed=1, guidance_scale=3.5, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "worst", "bytes_a_weight"), [("int8", 0.01, 1.0), ("nf4", 0.06, 0.5), ("fp8", 0.04, 1)]
)
def test_rounded_blocks_stay_within_the_stated_error_and_size(flux, kind, worst, bytes_a_weight):
    expected, model = at_eight_levels(flux), copy.deepcopy(flux)
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks." in name
    ]
    in_blocks = sum(layer.weight.numel() for layer in layers)
    before = stored_bytes(model)
    quantise(model, kind, dtype=torch.float32, device="cpu")
    errors = [relative_rms(*pair) for pair in zip(at_eight_levels(model), expected, strict=True)]
    assert len(errors) == 8
    assert 1e-5 < max(errors) < worst
    # Scales: 4 bytes a row of 128 inputs, or for each 64 weights.
    saved = (4 - bytes_a_weight) * in_blocks
    assert 0.95 * saved < before - stored_bytes(model) < saved
    # The layers outside of the blocks are those that were there.
    for name in ("x_embedder", "context_embedder", "proj_out", "norm_out.linear"):
        assert torch.equal(model.get_submodule(name).weight, flux.get_submodule(name).weight)
    rounded = {name for name, one in model.named_parameters() if is_quantised(one)}
    assert len(rounded) == len(layers)
    assert all("transformer_blocks." in name for name in rounded)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_int8_weights_are_the_nearest_of_255_levels_of_each_row(flux):
    """The closed form: w ~ scale * round(w / scale), scale = largest of the row over 127.5."""
    model = copy.deepcopy(flux)
    weight = model.transformer_blocks[0].attn.to_q.weight.detach().clone()
    quantise(model, "int8", dtype=torch.float32, device="cpu")
    stored = model.transformer_blocks[0].attn.to_q.weight
    scale = stored.scale.reshape(-1, 1)
    assert torch.all((stored.dequantize() - weight).abs() <= 0.5001 * scale)
    largest = weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, largest / 127.5, rtol=1e-5, atol=0)


def test_gradients_pass_rounded_layers(flux):
    inputs = torch.randn(3, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for kind in ("int8", "nf4", "fp8"):
        model = copy.deepcopy(flux)
        quantise(model, kind, dtype=torch.float32, device="cpu")
        layer = model.transformer_blocks[0].attn.to_q
        (given,) = torch.autograd.grad(layer(inputs).sum(), inputs)
        # Of a linear map: what an input of ones in one place adds to the outputs' sum.
        columns = layer(torch.eye(128)) - layer(torch.zeros(1, 128))
        torch.testing.assert_close(given[0], columns.sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_blocks_that_wait_elsewhere_change_nothing(tiny_backbone, name):
    model = tiny_backbone(name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    texts = (torch.randn(1, 8, 16, generator=generator), torch.randn(1, 16, generator=generator))

    def predict():
        with torch.no_grad():
            t = torch.tensor([0.4])
            return backbone_of(model).predict(
                model, latents, t, *texts, guidance_scale=3.5, dtype=torch.float32
            )

    whole = predict()
    offload_blocks(model, "cpu")
    assert float((predict() - whole).abs().max()) == 0.0
    end_offload(model)
    assert not any(
        hasattr(part, "_diffusers_hook") and part._diffusers_hook.hooks for part in model.modules()
    )
    assert torch.equal(predict(), whole)


def test_layers_of_a_text_encoder_wait_likewise():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0
    )
    model = T5EncoderModel(config).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(tokens)[0]
        rounded = copy.deepcopy(model)
        offload_layers(model, "cpu")
        assert float((model(tokens)[0] - whole).abs().max()) == 0.0
        # T5 takes its inputs to the dtype of one layer's weights: packed ones must not be read.
        quantise(rounded, "nf4", dtype=torch.float32, device="cpu")
        assert 0 < relative_rms(rounded(tokens)[0], whole) < 0.5


def test_what_cannot_work_is_one_line(monkeypatch, flux):
    stage = load_settings(Path(__file__).parents[4] / "params.yaml").dit_stage1
    assert "adapter null" in training_problem("int8", stage)
    adapter = AdapterSettings(rank=2, alpha=2, target_modules=("to_q",))
    adapted = stage.model_copy(update={"adapter": adapter, "zero_stage": 2})
    assert training_problem("int8", adapted) is None
    divided = adapted.model_copy(update={"zero_stage": 3})
    assert "zero_stage 0, 1 or 2" in training_problem("nf4", divided)
    waiting = adapted.model_copy(update={"offload_base": True})
    assert training_problem("int8", waiting) is None
    assert "offload_base does not move" in training_problem("nf4", waiting)
    with pytest.raises(ValueError, match="nf4; use int8"):
        parse_memory("block-offload").check("none", "nf4")
    with pytest.raises(ValueError, match="choose one"):
        parse_memory("block-offload,model-offload")
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(QuantisationUnavailable, match=r"nf4 needs bitsandbytes: .*\[gpu\]"):
        quantise(flux, "nf4", dtype=torch.float32, device="cpu")
    assert importlib.util.find_spec("torchao") is not None
