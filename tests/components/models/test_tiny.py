"""Tiny models: determinism, calibrated latents, an encoder that keeps the image."""

from __future__ import annotations

import pytest
import torch

from components.models.tiny import (
    build_tiny_autoencoder,
    build_tiny_transformer,
    synthetic_images,
)


def test_builders_are_deterministic_and_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    for build in (build_tiny_autoencoder, build_tiny_transformer):
        first, second, other = build(seed=3), build(seed=3), build(seed=4)
        pairs = list(zip(first.parameters(), second.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert any(
            not torch.equal(a, b)
            for a, b in zip(first.parameters(), other.parameters(), strict=True)
        )
    assert torch.equal(torch.random.get_rng_state(), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"stride": 1, "block_out_channels": (32, 64)},
        {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4},
    ],
)
def test_scaled_latents_of_synthetic_images_are_standard(shape: dict[str, object]) -> None:
    vae = build_tiny_autoencoder(**shape)
    size_px = min(256, 32 * vae.spatial_compression)
    latents = vae.encode(synthetic_images(4, size_px, seed=99)).latent_dist.mode()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.15
    assert 0.8 < scaled.std() < 1.25


@torch.no_grad()
def test_encoder_is_nearly_linear_and_keeps_most_of_the_image() -> None:
    vae = build_tiny_autoencoder()
    images = synthetic_images(4, 256, seed=7)
    latents = vae.encode(images).latent_dist.mode()
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    patches = patches.reshape(-1, 768).double()
    features = latents.movedim(1, -1).reshape(-1, 16).double()
    features = torch.cat((features, torch.ones(len(features), 1)), dim=1)
    solution = torch.linalg.lstsq(features, patches).solution
    left = (patches - features @ solution).square().mean()
    # The best 16 of 768 linear features of the same patches are the bound.
    spectrum = torch.linalg.svdvals(patches - patches.mean(0)).square()
    bound = spectrum[16:].sum() / patches.numel()
    assert left < 1.6 * bound
    predicted = torch.linalg.lstsq(patches, features[:, :16]).solution
    assert (patches @ predicted - features[:, :16]).square().mean() < 1e-3


def test_transformer_starts_at_zero_velocity() -> None:
    model = build_tiny_transformer()
    output = model(
        hidden_states=torch.randn(1, 6, 64),
        encoder_hidden_states=torch.randn(1, 4, 64),
        pooled_projections=torch.randn(1, 64),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([4.0]),
        grid_hw=(2, 3),
    ).sample
    assert not output.any()


def test_widths_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="block_out_channels"):
        build_tiny_autoencoder(block_out_channels=(12, 16), norm_num_groups=8)
