"""Shared fixtures: the repository root, a closed network, and single-threaded maths."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import small_project

from flows import environment

ROOT = Path(__file__).resolve().parents[1]

# Before any test imports torch: the test workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare(offline=True)

# `make test` draws the same examples every time; `make test-all` looks for new ones. Neither
# times an example: the machine is shared.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Whole pipelines, servers and stages as processes: started first, so that no test worker ends with
# one of them alone. `make test` keeps xdist from ordering the files anew.
LONGEST = (
    "test_served.py",
    "test_small_pipeline.py",
    "test_extending.py",
    "test_prefect_flow.py",
    "test_bad_input.py",
    "test_sources_by_command.py",
    "test_dvc_repro.py",
    "test_servers.py",
    "test_settings_reruns.py",
    "test_corpus_stages.py",
    "test_map_items.py",
    "test_uploader.py",
    "test_bad_files.py",
    "test_evaluate_inputs.py",
    "test_refusals.py",
    "test_exact.py",
    "test_drill.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            host = str(address[0])
            try:
                inside = ipaddress.ip_address(host).is_loopback
            except ValueError:
                inside = host == "localhost"
            if not inside:
                raise PermissionError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def trivial_clone() -> Callable[[Path, int], Path]:
    """Makes projects whose stages copy one file: `benchmarks/trivial_clone.py`."""
    import trivial_clone

    make: Callable[[Path, int], Path] = trivial_clone.trivial_clone
    return make


@pytest.fixture(scope="session")
def write_trained_weights() -> Callable[[Path, str], None]:
    """Puts tiny weights where the pipeline leaves its own: `write(project, "ema")`."""

    def write(project: Path, weights: str) -> None:
        from components.models.text_encoders import build_tiny_text_encoders
        from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer

        data = project / "data"
        encoders = data / "text_embeddings" / "encoders"
        texts = build_tiny_text_encoders(encoders, ["a lake", "a hill"])
        build_tiny_transformer(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=texts.text_encoder_2.config.d_model,
            pooled_projection_dim=texts.text_encoder.config.hidden_size,
        ).save_pretrained(data / "dit_stage2" / weights)
        build_tiny_autoencoder().save_pretrained(data / "vae" / "autoencoder")

    return write


@pytest.fixture(scope="session")
def typed() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command as it is typed in a project, in this process: `typed(project, "lineage", "vae")`.

    Imports are most of what a small command costs: a process of its own is for tests of processes,
    signals and a clone's own code.
    """
    from typer.testing import CliRunner

    from flows.cli import app

    def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        before = dict(os.environ)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project)
            try:
                done = CliRunner().invoke(app, arguments, catch_exceptions=False)
            finally:
                # What a command sets is for its own process.
                os.environ.clear()
                os.environ.update(before)
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes clones of this project: `clone(name, {"vae.steps": 2}, photos=[...])`."""

    def make(name: str, settings: dict[str, Any], photos: Sequence[str] | None = None) -> Path:
        import trivial_clone

        target = tmp_path_factory.mktemp("clones") / name
        trivial_clone.copy_files(
            target, lambda file: not file.startswith("tests/") and file != "dvc.lock"
        )
        small_project.change_settings(target, settings)
        if photos is not None:
            small_project.keep_photos(target, photos)
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        # Photographs do not get smaller, and trying takes most of the time.
        stored = ["-c", "core.compression=0", "add", "."]
        for command in (["init", "-q"], stored, [*who, "commit", "-qm", "clone"]):
            subprocess.run(["git", *command], cwd=target, check=True)
        return target

    return make


@pytest.fixture(scope="module")
def small_clone(clone: Callable[..., Path]) -> Callable[..., Path]:
    """Makes clones with the small project's photographs and settings: `small_clone(name)`."""

    def make(name: str, changes: Mapping[str, Any] | None = None) -> Path:
        return clone(name, small_project.SETTINGS | (changes or {}), small_project.PHOTOS)

    return make


@pytest.fixture
def training_environment_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process sets variables for DeepSpeed; take them back afterwards."""
    from components.training.distributed.ranks import training_environment

    for name in (*training_environment("cpu"), "LOCAL_RANK"):
        if name not in os.environ:
            # Registers the name for removal, whatever the test sets it to.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
