"""Shared fixtures: the repository root, a closed network, and single-threaded maths."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from flows import environment

ROOT = Path(__file__).resolve().parents[1]

# Before any test imports torch: two test workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
environment.prepare(offline=True)

# `make test` draws the same examples every time; `make test-all` looks for new ones. Neither
# times an example: the machine is shared.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Whole pipelines: started first, so that no test worker ends with them alone.
LONGEST = (
    "test_served.py",
    "test_small_pipeline.py",
    "test_bad_input.py",
    "test_services.py",
    "test_pipeline.py",
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
    path = ROOT / "benchmarks" / "trivial_clone.py"
    spec = importlib.util.spec_from_file_location("trivial_clone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[Path, int], Path] = module.trivial_clone
    return make


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        values = values[section]
    assert key in values, path
    values[key] = value


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes clones of this project: `clone(name, {"vae.steps": 2}, photos=[...])`."""

    def make(name: str, settings: dict[str, Any], photos: list[str] | None = None) -> Path:
        target = tmp_path_factory.mktemp("clones") / name
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for file in listed.stdout.decode().split("\0"):
            source = ROOT / file
            is_photo = source.suffix == ".jpg" and source.parent.name == "sample"
            left_out = file.startswith("tests/") or file == "dvc.lock"
            if photos is not None and is_photo and source.name not in photos:
                left_out = True
            if not file or left_out or not source.is_file():
                continue
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / file)
        values = yaml.safe_load((target / "params.yaml").read_text(encoding="utf-8"))
        for path, value in settings.items():
            _set(values, path, value)
        (target / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        if photos is not None:
            captions = target / "data" / "sample" / "captions.jsonl"
            lines = captions.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["file"] in photos]
            captions.write_text("\n".join(kept) + "\n", encoding="utf-8")
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "clone"]):
            subprocess.run(["git", *command], cwd=target, check=True)
        return target

    return make
