"""The picture that rounding a base changes is compared by the project's one PSNR."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.models.latent_tokens import pack_latents
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.models.pipeline import UltraFluxPipeline
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.settings.schema import load_settings
from components.training.adapters.base_rounding import BaseRounding, _picture_psnr, euler_latents
from components.training.dit.curriculum import keyed_generator


def test_the_pictures_psnr_is_of_its_8_bit_pixels(root):
    job = SimpleNamespace(
        autoencoder=load_settings(root / "params.yaml").models.autoencoder, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 4, 6, generator=generator)
    other = latents + 0.05 * torch.randn(latents.shape, generator=generator)
    vae = load_base_autoencoder(job.autoencoder, 0)
    with torch.no_grad():
        pixels = [
            np.rint(
                np.clip(
                    127.5
                    + 127.5
                    * vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor)
                    .sample[0]
                    .numpy(),
                    0,
                    255,
                )
            )
            for z in (latents, other)
        ]
    expected = 10 * math.log10(255**2 / np.square(pixels[0] - pixels[1]).mean())
    assert _picture_psnr(job, latents, other) == pytest.approx(expected, abs=1e-6)
    assert _picture_psnr(job, latents, latents) == math.inf
    assert _picture_psnr(SimpleNamespace(autoencoder=None), latents, other) is None


def test_record_and_card_state_the_picture_and_the_velocities():
    found = BaseRounding("int8", "bfloat16", "b", (0.004,) * 7 + (0.008,), 41.25, (8, 12))
    assert found.metrics() == {
        "rounding_velocity_error_worst": 0.008,
        "rounding_velocity_error_mean": pytest.approx(0.0045),
        "rounding_picture_psnr_db": 41.25,
    }
    assert "has PSNR 41.25 dB" in found.described()
    assert "| 0.400% |" in found.described()
    equal = BaseRounding("int8", "bfloat16", "b", (0.0,) * 8, math.inf, (8, 12))
    assert "rounding_picture_psnr_db" not in equal.metrics()


def test_the_picture_is_that_of_the_sampling_pipeline_in_eight_equal_steps():
    transformer = build_tiny_transformer(num_layers=1, num_single_layers=1)
    # Its first prediction is zero otherwise, and every schedule gives the same.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    generator = torch.Generator().manual_seed(2)
    texts = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 64, generator=generator)
    pipeline = UltraFluxPipeline.from_components(build_tiny_autoencoder(), transformer, shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=texts[0],
        pooled_prompt_embeds=texts[1],
        height=64,
        width=96,
        num_inference_steps=8,
        guidance_scale=3.5,
        generator=keyed_generator(7, -10, "picture"),
        output_type="latent",
    ).images
    found = euler_latents(
        transformer,
        torch.zeros(1, 16, 4, 6),
        texts,
        seed=7,
        guidance_scale=3.5,
        dtype=torch.float32,
    )
    torch.testing.assert_close(pack_latents(found), expected)
