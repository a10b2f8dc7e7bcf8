"""F16 autoencoder: phase convolution, decode modes, F8 folders, tiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from components.models.autoencoder_f16 import AutoencoderKLF16, UpsampledConv2d
from components.models.tiny import build_tiny_autoencoder

SHAPE = {
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def _f8() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoencoderKL(
            **SHAPE,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        ).eval()


def _map(seed: int = 0, size: tuple[int, int] = (5, 7)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, *size, generator=generator, dtype=torch.float64)


def test_phase_convolution_equals_upsampling_then_convolution() -> None:
    layer = UpsampledConv2d(6, 3, "aligned").double()
    features = _map()
    upsampled = F.interpolate(features, scale_factor=2, mode="nearest")
    expected = F.conv2d(upsampled, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(features), expected, rtol=0, atol=1e-12)


def test_official_partitioned_equals_the_released_decoders_formula() -> None:
    layer = UpsampledConv2d(6, 3, "official_partitioned").double()
    features = _map()
    height, width = features.shape[-2:]
    padded = F.interpolate(F.pad(features, (1, 1, 1, 1)), scale_factor=2, mode="nearest")
    full = F.conv2d(padded, layer.weight, layer.bias, padding=1)
    expected = full[:, :, 1 : 2 * height + 1, 1 : 2 * width + 1]
    torch.testing.assert_close(layer(features), expected, rtol=0, atol=1e-12)


def test_gradients_reach_the_three_by_three_kernel() -> None:
    layer = UpsampledConv2d(6, 3, "aligned").double()
    layer(_map()).square().sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    upsampled = F.interpolate(_map(), scale_factor=2, mode="nearest")
    F.conv2d(upsampled, layer.weight, layer.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


def test_decode_modes_differ_by_exactly_one_pixel_down_and_right(tmp_path: Path) -> None:
    aligned = build_tiny_autoencoder(**SHAPE)
    aligned.save_pretrained(tmp_path)
    shifted = AutoencoderKLF16.from_pretrained(tmp_path, decode_mode="official_partitioned")
    latents = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = aligned.decode(latents).sample, shifted.decode(latents).sample
    assert a.shape == b.shape == (1, 3, 48, 64)
    torch.testing.assert_close(b[:, :, 1:, 1:], a[:, :, :-1, :-1], rtol=0, atol=1e-5)


def test_f8_folder_loads_as_f16_with_its_own_keys_and_a_stem_at_even_pixels(
    tmp_path: Path,
) -> None:
    f8 = _f8()
    f8.save_pretrained(tmp_path)
    f16 = AutoencoderKLF16.from_pretrained(tmp_path, stride=2)
    assert f16.spatial_compression == 16
    assert f16.config.shift_factor == 0.1
    state = f16.state_dict()
    assert list(state) == list(f8.state_dict())
    assert all(torch.equal(state[name], value) for name, value in f8.state_dict().items())
    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        f16.encoder.conv_in(image), f8.encoder.conv_in(image)[:, :, ::2, ::2]
    )


def test_stride_one_is_the_f8_model(tmp_path: Path) -> None:
    f8 = _f8()
    f8.save_pretrained(tmp_path)
    same = AutoencoderKLF16.from_pretrained(tmp_path, stride=1).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(same(image).sample, f8(image).sample)
    assert same.spatial_compression == 8


def test_configuration_survives_saving_and_loading(tmp_path: Path) -> None:
    model = build_tiny_autoencoder(**SHAPE, decode_mode="official_partitioned")
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLF16.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLF16"
    assert (config["stride"], config["decode_mode"]) == (2, "official_partitioned")
    assert loaded.decoder.conv_out.decode_mode == "official_partitioned"
    assert loaded.config.scaling_factor == model.config.scaling_factor
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )


@pytest.mark.parametrize("decode_mode", ["aligned", "official_partitioned"])
def test_tiled_coding_has_the_right_size_and_is_close(decode_mode: str) -> None:
    model = build_tiny_autoencoder(decode_mode=decode_mode)
    image = torch.randn(1, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, scale_factor=16, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        latents = model.encode(image).latent_dist.mode()
        decoded = model.decode(latents).sample
        model.enable_tiling()
        model.set_tile_size(128)
        tiled_latents = model.encode(image).latent_dist.mode()
        tiled = model.decode(latents).sample
    assert tiled_latents.shape == latents.shape == (1, 16, 12, 20)
    assert tiled.shape == decoded.shape == (1, 3, 192, 320)
    # The encoder sees 16x16 patches only, so its tiles agree; a decoder tile has its own norms.
    torch.testing.assert_close(tiled_latents, latents, atol=1e-2, rtol=0)
    assert (tiled - decoded).square().mean() < 0.3 * decoded.var()


def test_slicing_changes_nothing() -> None:
    model = build_tiny_autoencoder(**SHAPE)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(images).sample
        model.enable_slicing()
        torch.testing.assert_close(model(images).sample, whole, atol=1e-5, rtol=1e-5)


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    model = build_tiny_autoencoder(**SHAPE).requires_grad_(True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(images).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decode_mode", ["aligned", "official_partitioned"])
def test_bfloat16_is_close_to_float32(decode_mode: str) -> None:
    model = build_tiny_autoencoder(decode_mode=decode_mode)
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.decode(latents).sample
        rounded = model.to(torch.bfloat16).decode(latents.bfloat16()).sample.float()
    assert (rounded - exact).square().mean() < 1e-3 * exact.var()


def test_bad_settings_and_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^stride:"):
        AutoencoderKLF16(stride=3)
    with pytest.raises(ValueError, match=r"^decode_mode:"):
        AutoencoderKLF16(decode_mode="shifted")
    model = build_tiny_autoencoder(**SHAPE)
    with pytest.raises(ValueError, match=r"^tile_px: .* 64"):
        model.set_tile_size(100)
    with pytest.raises(ValueError, match="40x32"):
        model.encode(torch.zeros(1, 3, 40, 32))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        AutoencoderKLF16.from_pretrained(tmp_path)
