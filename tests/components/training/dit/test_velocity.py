from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from components.models.latent_tokens import pack_latents, unpack_latents
from components.models.tiny import build_tiny_transformer
from components.objectives.flow_matching import flow_matching_loss
from components.objectives.objective import objective_loss
from components.settings.objective import ObjectiveSettings, SnrHuberSettings
from components.training.dit.velocity import NoisedBatch, predict_velocity


def make_batch(height: int = 8, width: int = 12, count: int = 2) -> NoisedBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 16, height, width)
    return NoisedBatch(
        sample_ids=tuple("abc"[:count]),
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        t=torch.linspace(0.2, 0.8, count),
        text=torch.randn(count, 5, 64, generator=generator),
        pooled=torch.randn(count, 64, generator=generator),
    )


def small_transformer(**options):
    model = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        **options,
    )
    torch.nn.init.normal_(
        model.proj_out.weight, std=0.02, generator=torch.Generator().manual_seed(1)
    )
    return model


def test_packing_is_that_of_the_flux_pipeline():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack_latents(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))


def test_unpacking_inverts_packing():
    latents = torch.randn(3, 16, 4, 14)
    assert torch.equal(unpack_latents(pack_latents(latents), 2, 7), latents)


def test_prediction_equals_the_transformer_called_as_the_pipeline_calls_it():
    model, batch = small_transformer(), make_batch()
    noised = (1 - batch.t)[:, None, None, None] * batch.latents
    noised = noised + batch.t[:, None, None, None] * batch.noise
    with torch.no_grad():
        expected = model(
            hidden_states=FluxPipeline._pack_latents(noised, 2, 16, 8, 12),
            encoder_hidden_states=batch.text,
            pooled_projections=batch.pooled,
            timestep=batch.t,
            guidance=torch.full((2,), 3.5),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
        velocity = predict_velocity(model, batch, 3.5, torch.float32)
    unpacked = FluxPipeline._unpack_latents(expected, 64, 96, 8)
    torch.testing.assert_close(velocity, unpacked)


def test_guidance_reaches_models_that_embed_it_and_others_do_without():
    batch = make_batch()
    with torch.no_grad():
        guided = small_transformer()
        one = predict_velocity(guided, batch, 1.0, torch.float32)
        four = predict_velocity(guided, batch, 4.0, torch.float32)
        assert not torch.equal(one, four)
        plain = small_transformer(guidance_embeds=False)
        assert torch.equal(
            predict_velocity(plain, batch, 1.0, torch.float32),
            predict_velocity(plain, batch, 4.0, torch.float32),
        )


@pytest.mark.parametrize("kind", ["snr_huber", "flow_matching", "wavelet"])
def test_every_objective_is_zero_for_the_true_velocity_only(kind):
    settings = ObjectiveSettings(kind=kind, wavelet_space="v", snr_huber=SnrHuberSettings())
    batch = make_batch()
    truth = batch.noise - batch.latents
    assert objective_loss(
        settings, truth, batch.latents, batch.noise, batch.t
    ).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert bool(
        (objective_loss(settings, truth + 0.1, batch.latents, batch.noise, batch.t) > 0).all()
    )


def test_wavelet_objective_on_velocities_equals_flow_matching():
    settings = ObjectiveSettings(kind="wavelet", wavelet_space="v", snr_huber=SnrHuberSettings())
    batch = make_batch()
    velocity = torch.randn_like(batch.latents)
    torch.testing.assert_close(
        objective_loss(settings, velocity, batch.latents, batch.noise, batch.t),
        flow_matching_loss(velocity, batch.latents, batch.noise),
    )


def test_odd_latents_are_refused():
    with pytest.raises(ValueError, match="even"):
        predict_velocity(small_transformer(), make_batch(7, 8), 1.0, torch.float32)


def test_a_batch_in_the_stored_precision_is_widened_exactly_on_its_way() -> None:
    stored = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = torch.ones(2, 3, 5, dtype=torch.bfloat16)
    loaded = NoisedBatch(("a", "b"), stored, stored.float(), torch.ones(2), text, text[:, 0])
    moved = loaded.to(torch.device("cpu"))
    assert moved.latents.dtype == torch.float32
    assert torch.equal(moved.latents.bfloat16(), stored)
    assert moved.text.dtype == torch.bfloat16
