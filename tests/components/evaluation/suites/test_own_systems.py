"""Systems of this project's own weights: what the pipeline trained, and autoencoders alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.evaluation.measuring.reconstruction import reconstruct
from components.evaluation.suites.suites import SuiteItem
from components.evaluation.suites.system import Sampling, SystemFailed
from components.evaluation.suites.systems import AutoencoderSystem, UltraFluxSystem, parse_system
from components.files.weight_folders import WeightsMissing
from components.models.tiny import build_tiny_autoencoder
from components.settings.schema import Settings, load_settings

SAMPLING = Sampling(num_inference_steps=2)


@pytest.fixture(scope="module")
def settings(root: Path) -> Settings:
    return load_settings(root / "params.yaml")


@pytest.fixture(scope="module")
def trained(
    settings: Settings,
    write_trained_weights: Callable[[Path, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A project whose pipeline has run, as far as its weights show."""
    project = tmp_path_factory.mktemp("project")
    write_trained_weights(project, settings.generate.weights)
    return project


def test_trained_weights_are_a_system_and_its_painter_makes_the_same_picture(
    trained: Path, settings: Settings, tmp_path: Path
) -> None:
    system = parse_system("ours=trained", trained, settings, SAMPLING)
    assert isinstance(system, UltraFluxSystem)
    item = SuiteItem("a", "a lake", 64, 96, 1)
    (path,) = system.pictures([item], tmp_path)
    kept_at = path.stat().st_mtime_ns
    assert system.pictures([item], tmp_path) == [path]
    assert path.stat().st_mtime_ns == kept_at
    painted = system.painter()(item)
    assert painted.size == (96, 64)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(painted))


def test_weights_that_were_not_trained_yet_name_the_command(
    settings: Settings, tmp_path: Path
) -> None:
    system = parse_system("ours=trained", tmp_path, settings, SAMPLING)
    with pytest.raises(WeightsMissing, match="ultraflux run"):
        system.pictures([SuiteItem("a", "a lake", 64, 96, 1)], tmp_path / "out")


def test_an_autoencoder_reconstructs_each_reference_once(
    trained: Path, settings: Settings, tmp_path: Path
) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    reference = tmp_path / "real.png"
    Image.fromarray(rgb).save(reference)
    folder = trained / "data" / "vae" / "autoencoder"
    system = parse_system(f"ae=vae:{folder}", trained, settings, SAMPLING)
    assert isinstance(system, AutoencoderSystem)
    item = SuiteItem("a", "", 64, 96, 1, reference)
    (path,) = system.pictures([item], tmp_path / "out")
    with Image.open(path) as image:
        made = np.asarray(image)
    assert np.array_equal(made, reconstruct(build_tiny_autoencoder(), rgb))
    kept_at = path.stat().st_mtime_ns
    system.pictures([item], tmp_path / "out")
    assert path.stat().st_mtime_ns == kept_at
    # Another picture under the same name is reconstructed anew.
    Image.fromarray(255 - rgb).save(reference)
    system.pictures([item], tmp_path / "out")
    with Image.open(path) as image:
        assert not np.array_equal(np.asarray(image), made)
    with pytest.raises(SystemFailed, match="item a has no picture"):
        system.pictures([replace(item, reference=None)], tmp_path / "out")
