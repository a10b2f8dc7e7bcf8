"""Reconstruction through the tiny autoencoder keeps sizes and the 8-bit convention."""

from __future__ import annotations

import numpy as np
import torch

from components.evaluation.measuring.reconstruction import fidelity_metrics, reconstruct
from components.models.tiny import build_tiny_autoencoder


def test_reconstruction_is_8_bit_of_the_same_size_and_equals_the_models_output() -> None:
    autoencoder = build_tiny_autoencoder()
    rgb = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    result = reconstruct(autoencoder, rgb)
    assert result.shape == rgb.shape
    assert result.dtype == np.uint8
    scaled = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(scaled).latent_dist.mode()).sample[0]
    expected = ((decoded.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
    assert np.abs(result - expected).max() <= 0.5 + 1e-3
    assert set(fidelity_metrics(rgb, result)) == {"psnr_db", "ssim", "nmse"}
