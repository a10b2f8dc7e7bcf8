"""LPIPS: the released implementation on the same random weights, and tiles against the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.metrics.networks.lpips import Backbone, Lpips


def _noise(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    b = np.clip(a + generator.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    return a, b


@pytest.fixture(scope="module")
def alex() -> Lpips:
    torch.manual_seed(0)
    return Lpips("alex", tile_px=64)


@pytest.mark.parametrize("backbone", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_it_equals_the_released_implementation(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = pytest.importorskip("lpips")
    # The reference builds torchvision's classifier too, whose random weights take seconds.
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    torch.manual_seed(1)
    reference = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    heads = {
        f"lin{k}.model.1.weight": torch.rand_like(lin.model[1].weight)
        for k, lin in enumerate(reference.lins)
    }
    reference.load_state_dict(heads, strict=False)
    state = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in reference.net.state_dict().items()
    }
    ours = Lpips(backbone, tile_px=64)
    ours.load(state, heads)
    # One tile of VGG, several of AlexNet.
    ours.tile_px = 256 if backbone == "vgg" else 64
    a, b = _noise(90, 131, 2)
    tensors = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1.0 for x in (a, b)]
    with torch.no_grad():
        expected = float(reference(*tensors))
    assert ours(a, b) == pytest.approx(expected, rel=2e-6)


@settings(max_examples=4)
@given(st.integers(64, 250), st.integers(64, 250), st.sampled_from([64, 112, 128]))
def test_tiles_of_any_size_equal_the_whole_image(
    alex: Lpips, height: int, width: int, tile: int
) -> None:
    a, b = _noise(height, width, height)
    alex.tile_px = 1024
    whole = alex(a, b)
    alex.tile_px = tile
    try:
        assert alex(a, b) == pytest.approx(whole, rel=1e-6)
    finally:
        alex.tile_px = 64


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(200, 170), (163, 225)])
def test_tiles_of_vgg_equal_the_whole_image(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    network = Lpips("vgg", tile_px=1024)
    a, b = _noise(*shape, 4)
    whole = network(a, b)
    network.tile_px = 96
    assert network(a, b) == pytest.approx(whole, rel=1e-6)


def test_a_tile_with_too_small_a_halo_would_differ(alex: Lpips) -> None:
    # The halo is needed: without it the bound above would not notice anything.
    a, b = _noise(256, 256, 5)
    whole = alex(a, b)
    layout = alex.layout
    alex.layout = type(layout)(layout.cuts, layout.strides_px, 32)
    try:
        assert abs(alex(a, b) / whole - 1) > 1e-5
    finally:
        alex.layout = layout


def test_equal_images_have_distance_zero_and_unequal_shapes_are_refused(alex: Lpips) -> None:
    a, b = _noise(80, 96, 6)
    assert alex(a, a) == 0.0
    assert alex(a, b) > 0.0
    with pytest.raises(ValueError, match="shapes differ"):
        alex(a, b[:64])
    with pytest.raises(ValueError, match="at least 64 px"):
        alex(a[:32], b[:32])


def test_a_file_of_another_network_is_refused(alex: Lpips) -> None:
    with pytest.raises(ValueError, match=r"no tensor features\.0\.weight"):
        alex.load({}, {})
