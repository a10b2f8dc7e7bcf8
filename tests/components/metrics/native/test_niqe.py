"""NIQE against pyiqa on a parameter file of our own making, and its limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from components.files.weight_folders import WeightsMissing
from components.metrics.metric import Picture
from components.metrics.native.niqe import asymmetric_gaussian, niqe, read_parameters
from components.metrics.registry import open_metric

PICTURE = Picture(Path("a.png"), "0" * 64)


def photograph(root: Path, height: int, width: int) -> np.ndarray:
    file = sorted((root / "data" / "sample").glob("**/*.jpg"))[0]
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the published layout with a mean and a proper covariance."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(36, 36)) * 0.1
    file = tmp_path_factory.mktemp("weights") / "niqe" / "niqe_modelparameters.mat"
    file.parent.mkdir()
    mean = rng.uniform(0.3, 2.0, (1, 36))
    savemat(file, {"mu_prisparam": mean, "cov_prisparam": root @ root.T + 0.05 * np.eye(36)})
    return file


@pytest.mark.parametrize("size", [(192, 288), (300, 401)])
def test_the_number_is_pyiqas(
    root: Path, parameters: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyiqa.archs.niqe_arch import NIQE
    from pyiqa.matlab_utils import resize

    rgb = photograph(root, *size)
    ours = niqe(rgb, *read_parameters(parameters))
    assert ours is not None
    network = NIQE(pretrained_model_path=str(parameters))
    image = torch.from_numpy(rgb / 255.0).permute(2, 0, 1)[None]
    assert ours == pytest.approx(float(network(image)), rel=1e-3)
    # Its halving goes through float32; in float64 the arithmetic is one.
    monkeypatch.setattr(resize, "cast_input", lambda x: (x, None))
    assert ours == pytest.approx(float(network(image)), rel=1e-6)


def test_the_fit_finds_the_shape_of_known_distributions() -> None:
    rng = np.random.default_rng(1)
    gaussian = rng.normal(0, 2.0, (1, 600, 600))
    laplace = rng.laplace(0, 1.5, (1, 600, 600))
    for values, exponent in ((gaussian, 2.0), (laplace, 1.0)):
        shape, left, right = asymmetric_gaussian(values)
        assert shape[0] == pytest.approx(exponent, abs=0.03)
        assert left[0] == pytest.approx(right[0], rel=0.02)
    # Scales of exp(-(|x| / scale)^shape): sqrt(2) sigma, and b.
    assert asymmetric_gaussian(gaussian)[1][0] == pytest.approx(2.0 * 2**0.5, rel=0.02)
    assert asymmetric_gaussian(laplace)[1][0] == pytest.approx(1.5, rel=0.02)


def test_pictures_of_fewer_than_two_blocks_have_no_number(parameters: Path) -> None:
    values = read_parameters(parameters)
    noise = np.random.default_rng(2).integers(0, 256, (191, 191, 3), dtype=np.uint8)
    assert niqe(noise, *values) is None
    assert niqe(np.zeros((192, 192, 3), np.uint8), *values) is None


def test_a_missing_or_foreign_file_is_named(parameters: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"hf download chaofengc/IQA-PyTorch-Weights"):
        open_metric("niqe", tmp_path)
    rgb = np.random.default_rng(3).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    metric = open_metric("niqe", parameters.parents[1])
    assert metric.measure(rgb, PICTURE)["niqe"] == niqe(rgb, *read_parameters(parameters))
    (tmp_path / "niqe").mkdir()
    (tmp_path / "niqe" / "niqe_modelparameters.mat").write_bytes(b"no parameters")
    with pytest.raises(ValueError, match="not NIQE's parameters"):
        open_metric("niqe", tmp_path)
