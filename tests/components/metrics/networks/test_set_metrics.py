"""FID's network and resizes against independent implementations, on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.metrics.metric import Picture
from components.metrics.networks.frechet import frechet_distance
from components.metrics.networks.inception import (
    FidInception,
    bilinear_without_antialias,
    clean_resize,
    grid_patches,
    normalised,
)
from components.metrics.networks.set_metrics import (
    DinoFeatures,
    FeatureMetric,
    InceptionFeatures,
    frechet_and_kernel,
    load_inception,
)


def _rgb(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network() -> FidInception:
    torch.manual_seed(0)
    network = FidInception()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            # He's scale, so that features do not vanish over 20 layers.
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return network


def test_the_network_equals_the_pytorch_fid_port(
    network: FidInception, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = pytest.importorskip("pyiqa.archs.inception")
    state = network.net.state_dict()
    # The port fetches its weights by address; here it gets ours.
    monkeypatch.setattr(port, "load_pretrained_network", lambda net, _: net.load_state_dict(state))
    reference = port.InceptionV3([3]).eval()
    x = normalised(_rgb(299, 299, 1).astype(np.float32))
    with torch.no_grad():
        expected = reference(x)[0][:, :, 0, 0]
        ours = network(x)
    assert expected.std() > 0
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [(299, 299), (512, 640), (300, 900), (150, 200)])
def test_the_bilinear_resize_equals_torch_fidelity(size: tuple[int, int]) -> None:
    port = pytest.importorskip("pyiqa.archs.interpolate_compat_tensorflow")
    rgb = _rgb(*size, 2)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    expected = port.interpolate_bilinear_2d_like_tensorflow1x(
        x, size=(299, 299), align_corners=False
    )
    ours = bilinear_without_antialias(rgb)
    assert np.abs(ours - expected[0].permute(1, 2, 0).numpy()).max() < 1e-2
    assert np.abs(ours - expected[0].permute(1, 2, 0).numpy()).mean() < 1e-4


def test_the_clean_resize_equals_pyiqas_clean_fid(tmp_path: Path) -> None:
    fid = pytest.importorskip("pyiqa.archs.fid_arch")
    rgb = _rgb(400, 333, 3)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    expected = fid.ResizeDataset([tmp_path / "a.png"], "clean")[0]
    assert np.array_equal(clean_resize(rgb), expected.permute(1, 2, 0).numpy())


def test_the_two_resizes_disagree_on_fine_texture_and_agree_on_flat_images() -> None:
    checker = np.indices((900, 900)).sum(0) % 2 * 255
    rgb = np.repeat(checker[..., None], 3, axis=2).astype(np.uint8)
    # Antialiasing leaves grey; four taps leave values that depend on the phase.
    assert clean_resize(rgb).std() < 2 < 20 < bilinear_without_antialias(rgb).std()
    flat = np.full((500, 400, 3), 77, np.uint8)
    assert np.allclose(clean_resize(flat), bilinear_without_antialias(flat), atol=1e-4)


def test_patches_are_native_pixels_of_a_centred_grid() -> None:
    rgb = _rgb(4096 // 4, 610, 4)
    patches = grid_patches(rgb)
    assert len(patches) == 3 * 2
    assert np.array_equal(patches[0], rgb[63 : 63 + 299, 6 : 6 + 299])
    assert np.array_equal(patches[-1], rgb[63 + 598 : 63 + 897, 6 + 299 : 6 + 598])
    assert grid_patches(rgb[:298]) == []


def test_features_combine_to_zero_distance_with_themselves(network: FidInception) -> None:
    picture = Picture(Path("x.png"), "0" * 64)
    metric = FeatureMetric(
        ("patch_fid", "patch_kid"),
        "inception2048/patch299/v1",
        "0" * 64,
        InceptionFeatures(network, "patch299", "cpu"),
        frechet_and_kernel("patch_fid", "patch_kid"),
    )
    ours = metric.features(_rgb(610, 620, 5), picture)
    assert ours.shape == (4, 2048)
    assert ours.dtype == np.float32
    assert metric.features(_rgb(200, 620, 5), picture).shape == (0, 2048)
    scale = float(np.square(ours, dtype=np.float64).sum())
    same = metric.combine(ours, ours)
    assert set(same) == {"patch_fid", "patch_kid", "patch_kid_spread"}
    assert abs(same["patch_fid"]) < 1e-9 * scale
    assert metric.combine(ours, 2 * ours)["patch_fid"] == frechet_distance(ours, 2 * ours)


def test_weights_of_another_network_are_refused(tmp_path: Path, network: FidInception) -> None:
    state = network.net.state_dict()
    torch.save(state, tmp_path / "good.pth")
    loaded = load_inception(tmp_path / "good.pth").net.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    state.pop("Mixed_5b.branch1x1.conv.weight")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"not the FID InceptionV3.*Mixed_5b\.branch1x1"):
        load_inception(tmp_path / "bad.pth")


def test_dino_features_are_the_class_token_of_the_stock_model(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    rgb = _rgb(300, 260, 6)
    row = DinoFeatures(tmp_path, "cpu")(rgb)
    pixels = (clean_resize(rgb, 224) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model(
            torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
        ).pooler_output
    assert row.shape == (1, 32)
    assert np.allclose(row, expected.numpy(), atol=1e-5)
