"""MUSIQ without attention matrices equals pyiqa's network on the same random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.metrics.networks.musiq import STEM_PATCHES, Musiq


@pytest.fixture(scope="module")
def pair() -> tuple[Musiq, torch.nn.Module]:
    arch = pytest.importorskip("pyiqa.archs.musiq_arch")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 3}
    reference = arch.MUSIQ(pretrained=False, **sizes).eval()
    for parameter in reference.parameters():
        if parameter.ndim == 2:
            # Larger than the default, so that attention is far from uniform.
            torch.nn.init.normal_(parameter, std=0.3)
    ours = Musiq(width=48, hidden=96, heads=3, layers=3)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.mark.parametrize("size", [(224, 224), (512, 700), (701, 333), (97, 1000)])
def test_it_equals_pyiqas_network(
    pair: tuple[Musiq, torch.nn.Module], size: tuple[int, int]
) -> None:
    ours, reference = pair
    image = torch.from_numpy(np.random.default_rng(1).random((1, 3, *size), dtype=np.float32))
    with torch.no_grad():
        expected = float(reference(image))
        assert float(ours(image)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_blocks_of_patches_change_nothing(
    pair: tuple[Musiq, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair
    image = torch.rand((1, 3, 300, 260), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = float(ours(image))
        monkeypatch.setattr("components.metrics.networks.musiq.STEM_PATCHES", 7)
        assert STEM_PATCHES > 90
        assert float(ours(image)) == pytest.approx(whole, rel=1e-5)


def test_parameter_names_and_sizes_are_the_published_ones() -> None:
    arch = pytest.importorskip("pyiqa.archs.musiq_arch")
    with torch.device("meta"):
        published = {k: v.shape for k, v in arch.MUSIQ(pretrained=False).state_dict().items()}
        assert {k: v.shape for k, v in Musiq().state_dict().items()} == published
