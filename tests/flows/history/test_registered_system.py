"""Registered models as systems: found by alias and version, sampled only if still the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from components.evaluation.suites.suites import SuiteItem
from components.evaluation.suites.system import Sampling, SystemFailed
from components.evaluation.suites.systems import AutoencoderSystem, UltraFluxSystem, parse_system
from components.files.weight_folders import folder_digest
from components.settings.schema import Settings, load_settings
from flows.history.registered_system import find_system
from flows.tracking.registry import Promotion, register
from flows.tracking.uploader import Uploader

SAMPLING = Sampling(num_inference_steps=2)


@pytest.fixture(scope="module")
def settings(root: Path) -> Settings:
    return load_settings(root / "params.yaml")


@pytest.fixture(scope="module")
def project(
    root: Path,
    settings: Settings,
    write_trained_weights: Callable[[Path, str], None],
    tmp_path_factory: pytest.TempPathFactory,
    give_store: Callable[[Path], None],
) -> Path:
    """Trained weights, as the pipeline leaves them, registered under the alias `candidate`."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy2(root / "params.yaml", folder / "params.yaml")
    shutil.copytree(root / "mlflow", folder / "mlflow")
    weights = settings.generate.weights
    write_trained_weights(folder, weights)
    give_store(folder)
    uploader = Uploader(folder)
    for kind, place in (
        ("transformer", f"data/dit_stage2/{weights}"),
        ("autoencoder-f16", "data/vae/autoencoder"),
    ):
        model = f"{settings.project.name}-{kind}"
        promotion = Promotion(model, place, folder_digest(folder / place), "candidate")
        register(uploader.client, uploader.experiment_id, None, promotion)
    return folder


def test_an_alias_samples_the_same_pictures_as_the_weights_it_names(
    project: Path, settings: Settings, tmp_path: Path
) -> None:
    model = f"{settings.project.name}-transformer"
    item = SuiteItem("a", "a lake", 64, 96, 1)
    trained = parse_system("ours=trained", project, settings, SAMPLING)
    (expected,) = trained.pictures([item], tmp_path / "trained")
    for spec in (f"{model}@candidate", f"{model}/1"):
        system = find_system(f"c=registry:{spec}", project, settings, SAMPLING)
        assert isinstance(system, UltraFluxSystem)
        (path,) = system.pictures([item], tmp_path / spec.replace("/", "-"))
        with Image.open(path) as ours, Image.open(expected) as theirs:
            assert ours.tobytes() == theirs.tobytes()


def test_a_registered_autoencoder_reconstructs(project: Path, settings: Settings) -> None:
    spec = f"{settings.project.name}-autoencoder-f16@candidate"
    system = find_system(f"ae=registry:{spec}", project, settings, SAMPLING)
    assert system == AutoencoderSystem("ae", project / "data/vae/autoencoder", SAMPLING)


def test_other_weights_at_its_place_are_refused(
    project: Path, settings: Settings, tmp_path: Path
) -> None:
    later = tmp_path / "later"
    shutil.copytree(project, later)
    config = later / "data" / "vae" / "autoencoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    spec = f"c=registry:{settings.project.name}-transformer@candidate"
    with pytest.raises(SystemFailed, match=r"autoencoder-f16 version 1 \(candidate\) has sha256"):
        find_system(spec, later, settings, SAMPLING)
    shutil.rmtree(later / "data" / "dit_stage2")
    with pytest.raises(SystemFailed, match=r"is not there; check out the commit"):
        find_system(spec, later, settings, SAMPLING)


def test_unknown_versions_and_a_missing_registry_are_one_line(
    project: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"{settings.project.name}-transformer"
    for spec, message in (
        (f"{model}@champion", r"not registered; registered: .*version 1 \(candidate\)"),
        (f"{model}/7", "not registered"),
        (model, "expected registry:MODEL@ALIAS"),
    ):
        with pytest.raises(ValueError, match=message):
            find_system(f"c=registry:{spec}", project, settings, SAMPLING)
    shutil.copytree(project / "mlflow", tmp_path / "mlflow")
    # Connecting names the store in the environment.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="no registry"):
        find_system(f"c=registry:{model}@champion", tmp_path, settings, SAMPLING)
    # Everything else is read as before.
    system = find_system("ours=trained", project, settings, SAMPLING)
    assert system == parse_system("ours=trained", project, settings, SAMPLING)
