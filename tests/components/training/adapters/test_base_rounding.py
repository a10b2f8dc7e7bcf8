"""The picture that rounding a base changes is compared by the project's one PSNR."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.models.loading.base_autoencoder import load_base_autoencoder
from components.settings.schema import load_settings
from components.training.adapters.base_rounding import BaseRounding, _picture_psnr


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
