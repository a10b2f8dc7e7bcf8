"""VAE loss: names, closed forms, published SSIM, gradients, LPIPS that fails closed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from components.files.weight_folders import WeightsMissing
from components.objectives.reconstruction import (
    MS_SSIM_WEIGHTS,
    RandomVggDistance,
    ReconstructionLoss,
    gmsd,
    ms_ssim,
    wavelet_l1,
)
from components.settings.training import ReconstructionSettings


def _settings(kind: str, **kwargs: Any) -> ReconstructionSettings:
    values: dict[str, Any] = {
        "wavelet": 0.2,
        "perceptual": 0.1,
        "l2": 1.0,
        "perceptual_kind": kind,
        "lpips_backbone": None,
        "lpips_sha256": None,
        **kwargs,
    }
    return ReconstructionSettings(**values)


def _images(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, size // 8, size // 8, generator=generator)
    target = F.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(-1, 1)
    target = (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(-1, 1)
    return target + 0.2 * torch.randn(target.shape, generator=generator), target


@pytest.mark.parametrize("kind", ["random_vgg", "ms_ssim", "gmsd"])
def test_terms_carry_their_kind_and_add_up_with_the_weights(kind: str) -> None:
    terms = ReconstructionLoss(_settings(kind))(*_images())
    assert set(terms) == {"l2", "wavelet_l1", f"perceptual_{kind}", "total"}
    expected = terms["l2"] + 0.2 * terms["wavelet_l1"] + 0.1 * terms[f"perceptual_{kind}"]
    torch.testing.assert_close(terms["total"], expected)
    assert all(value > 0 for value in terms.values())


def test_kind_none_has_no_perceptual_term() -> None:
    terms = ReconstructionLoss(_settings("none"))(*_images())
    assert set(terms) == {"l2", "wavelet_l1", "total"}


@pytest.mark.parametrize("kind", ["random_vgg", "ms_ssim", "gmsd", "none"])
def test_equal_images_cost_nothing_and_gradients_stay_finite(kind: str) -> None:
    _, target = _images()
    target[0] = 0.25  # flat: gradients of square roots and norms at zero
    prediction = target.clone().requires_grad_(True)
    total = ReconstructionLoss(_settings(kind))(prediction, target)["total"]
    assert total < 1e-4
    total.backward()
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("distance", [gmsd, lambda a, b: 1 - ms_ssim(a, b), RandomVggDistance()])
def test_perceptual_distances_grow_with_blur(distance: Any) -> None:
    _, target = _images()
    blurred = [F.avg_pool2d(target, k, 1, k // 2) for k in (1, 3, 7)]
    values = [distance(image, target).mean() for image in blurred]
    assert values[0] < values[1] < values[2]


def test_wavelet_term_of_a_constant_error_is_half_of_it() -> None:
    # Only the LL band sees a constant e, as 2 e; averaged over four bands that is e / 2.
    images = torch.zeros(1, 3, 8, 8)
    assert wavelet_l1(images + 0.3, images).item() == pytest.approx(0.15)


def test_single_scale_equals_scikit_images_ssim() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    prediction, target = (image[:1, :, :16, :16].clamp(-1, 1) for image in _images())
    grey = [
        ((image[0] + 1) / 2 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        for image in (prediction, target)
    ]
    _, full = metrics.structural_similarity(
        grey[0].double().numpy(),
        grey[1].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    # 16 px hold one scale; its exponent is the sum of the five (1.0001).
    expected = full[5:-5, 5:-5].mean() ** 1.0001
    assert ms_ssim(prediction, target).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "scales"), [(11, 1), (21, 1), (22, 2), (43, 2), (44, 3), (88, 4), (176, 5), (352, 5)]
)
def test_ms_ssim_uses_every_scale_that_holds_the_window(size: int, scales: int) -> None:
    # An inverted chequerboard: the finest scale is anti-correlated, which counts as 1e-4, and the
    # others, whose pixels are means of 2x2, are equal.
    even = (torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0
    target = torch.where(even, 0.5, -0.5).expand(1, 3, size, size)
    finest = MS_SSIM_WEIGHTS[0] / sum(MS_SSIM_WEIGHTS[:scales]) * sum(MS_SSIM_WEIGHTS)
    assert ms_ssim(-target, target).item() == pytest.approx(1e-4**finest, rel=1e-4)


def test_gmsd_equals_its_definition_in_numpy() -> None:
    def gradient_magnitude(image: torch.Tensor) -> Any:
        luma = np.tensordot([0.299, 0.587, 0.114], (image.double().numpy() + 1) / 2, 1)
        halved = luma.reshape(8, 2, 8, 2).mean((1, 3))
        rows, columns = (ndimage.prewitt(halved, axis, mode="constant") / 3 for axis in (0, 1))
        return np.hypot(rows, columns)

    predictions, targets = _images(16)
    for prediction, target, found in zip(
        predictions, targets, gmsd(predictions, targets), strict=True
    ):
        a, b = gradient_magnitude(prediction), gradient_magnitude(target)
        similarity = (2 * a * b + 170 / 255**2) / (a**2 + b**2 + 170 / 255**2)
        assert found.item() == pytest.approx(np.std(similarity), rel=1e-4)


def test_random_features_are_compared_by_their_angle_at_each_pixel() -> None:
    # Of unit vectors the squared distance is 2 - 2 cos; a mean over pixels, a sum over stages.
    distance, (a, b) = RandomVggDistance(), _images()
    found, expected = distance(a, b), torch.zeros(2)
    for stage in distance.stages:
        a, b = stage(a), stage(b)
        expected += (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_random_features_are_seeded_and_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = RandomVggDistance(), RandomVggDistance()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(*_images()), second(*_images()))
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_lpips_fails_closed_without_a_verified_backbone(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="lpips_backbone not set"):
        ReconstructionLoss(_settings("lpips"))
    file = tmp_path / "vgg16.pth"
    with pytest.raises(WeightsMissing, match="not found"):
        ReconstructionLoss(_settings("lpips", lpips_backbone=str(file)))
    file.write_bytes(b"other")
    with pytest.raises(WeightsMissing, match="lpips_sha256 not set"):
        ReconstructionLoss(_settings("lpips", lpips_backbone=str(file)))
    with pytest.raises(WeightsMissing, match="its sha256 is"):
        ReconstructionLoss(_settings("lpips", lpips_backbone=str(file), lpips_sha256="0" * 64))


def test_lpips_uses_the_verified_backbone(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    generator = torch.Generator().manual_seed(1)
    state, channels = {}, 3
    for index, width in zip(indices, widths, strict=True):
        kernel = torch.randn(width, channels, 3, 3, generator=generator)
        state[f"features.{index}.weight"] = kernel * (2 / (9 * channels)) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(width)
        channels = width
    file = tmp_path / "vgg16.pth"
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    loss = ReconstructionLoss(_settings("lpips", lpips_backbone=str(file), lpips_sha256=digest))
    assert torch.equal(
        loss.perceptual.net.slice5.get_submodule("28").weight, state["features.28.weight"]
    )
    prediction, target = _images()
    terms = loss(prediction, target)
    assert terms["perceptual_lpips"] > 0
    assert loss(target, target)["perceptual_lpips"] == 0


def test_shapes_must_agree() -> None:
    loss = ReconstructionLoss(_settings("none"))
    with pytest.raises(ValueError, match="prediction"):
        loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 16))
