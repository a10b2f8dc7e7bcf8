from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from components.models.backbones import BACKBONES, backbone_of, check_stores
from components.models.sd3.transformer import build_tiny_sd3_transformer
from components.models.tiny import build_tiny_transformer
from components.settings.schema import load_settings
from components.training.dit.velocity import NoisedBatch, predict_velocity

ROOT = Path(__file__).parents[3]


def small_sd3(**options):
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = build_tiny_sd3_transformer(**shape, pos_embed_max_size=8, **options)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=generator)
    return model


def make_batch(height: int, width: int) -> NoisedBatch:
    generator = torch.Generator().manual_seed(0)
    return NoisedBatch(
        sample_ids=("a", "b"),
        latents=torch.randn(2, 16, height, width, generator=generator),
        noise=torch.randn(2, 16, height, width, generator=generator),
        t=torch.tensor([0.25, 0.9]),
        text=torch.randn(2, 5, 64, generator=generator),
        pooled=torch.randn(2, 64, generator=generator),
    )


@pytest.mark.parametrize("size", [(16, 6), (4, 14)])
def test_sd3_velocity_equals_a_direct_call_of_diffusers_model(size):
    model, batch = small_sd3(), make_batch(*size)
    noised = (1 - batch.t)[:, None, None, None] * batch.latents
    noised = noised + batch.t[:, None, None, None] * batch.noise
    with torch.no_grad():
        expected = model(
            hidden_states=noised,
            encoder_hidden_states=batch.text,
            pooled_projections=batch.pooled,
            timestep=torch.tensor([250.0, 900.0]),
        ).sample
        velocity = predict_velocity(model, batch, 3.5, torch.float32)
        without = predict_velocity(model, batch, 1.0, torch.float32)
        rounded = predict_velocity(model.to(torch.bfloat16), batch, 1.0, torch.bfloat16)
    torch.testing.assert_close(velocity, expected)
    assert torch.equal(velocity, without)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, velocity, atol=0.1, rtol=0.1)


def test_the_configuration_tells_the_backbone_also_through_an_engine():
    class Engine(nn.Module):
        config = {}  # noqa: RUF012

        def __init__(self, module):
            super().__init__()
            self.module = module

    flux = build_tiny_transformer(num_layers=1, num_single_layers=1)
    assert backbone_of(Engine(flux)) is BACKBONES["flux"]
    assert backbone_of(Engine(small_sd3())) is BACKBONES["sd3"]
    foreign = nn.Linear(1, 1)
    foreign.config = {}
    with pytest.raises(ValueError, match=r"a Linear .* backbones flux, sd3"):
        backbone_of(foreign)


def test_stores_that_do_not_fit_the_transformer_are_named():
    model = small_sd3()
    check_stores(model, (64, 64), 16, [(16, 6), (2, 4)])
    with pytest.raises(ValueError, match="takes 16 latent channels, the latent store has 4"):
        check_stores(model, (64, 64), 4, [])
    with pytest.raises(ValueError, match=r"\(sd3\).* has 4096 and 64; use the text encoders"):
        check_stores(model, (4096, 64), 16, [])
    with pytest.raises(ValueError, match="18x4 need 9 patches"):
        check_stores(model, (64, 64), 16, [(2, 4), (18, 4)])
    with pytest.raises(ValueError, match="even edges"):
        check_stores(model, (64, 64), 16, [(3, 4)])
    flux = build_tiny_transformer(num_layers=1, num_single_layers=1)
    check_stores(flux, (64, 64), 16, [(200, 4)])
    with pytest.raises(ValueError, match=r"\(flux\): takes text states of width 64"):
        check_stores(flux, (64, 32), 16, [])


def test_a_folder_of_the_other_backbone_is_refused(tmp_path):
    settings = load_settings(ROOT / "params.yaml").models.transformer
    build_tiny_transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="UltraFluxTransformer2DModel, expected SD3"):
        BACKBONES["sd3"].load(tmp_path / "flux", settings)
    small_sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel, expected UltraFlux"):
        BACKBONES["flux"].load(tmp_path / "sd3", settings)
