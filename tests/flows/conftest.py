"""A small real DVC project in a git repository: a -> b, a -> c, (b, c) -> d."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Its loggers keep the stderr of the moment of the import, and fail once that is closed: a test that
# captures output must not be the first to import it.
import dvc  # noqa: F401
import pytest

from flows.clones import data_remote

META = (
    "{pool: cpu, gpus: 0, cpus: 1, mem_gb: 0.1, est_minutes: 0.1, retries: 1, timeout_min: 1.0, "
    "resumable: false, gate: false}"
)
PARAMS = "project: {name: toy}\nvalue: 1\n"
# b counts its runs, so that tests can see retries; a marker file makes it fail or hang.
DVC_YAML = f"""\
stages:
  a:
    cmd: cp params.yaml data/a
    deps: [source]
    params: [value]
    outs: [data/a]
    meta: {META}
  b:
    cmd: echo run >> b.runs; test -e b.hang && sleep 60; test ! -e b.fail && cp data/a data/b
    deps: [data/a]
    outs: [data/b]
    meta: {META}
  c:
    cmd: cat data/a source > data/c
    deps: [data/a, source]
    outs: [data/c]
    meta: {META}
  d:
    cmd: cat data/b data/c > data/d
    deps: [data/b, data/c]
    outs: [data/d]
    meta: {META}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Root of the project."""
    project = tmp_path / "toy"
    for folder in ("data", "mlflow", "runs"):
        (project / folder).mkdir(parents=True)
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "params.yaml").write_text(PARAMS)
    (project / "source").write_text("photographs\n")
    config = Path(__file__).resolve().parents[2] / "mlflow" / "tracking.yaml"
    (project / "mlflow" / "tracking.yaml").write_text(config.read_text())
    (project / ".gitignore").write_text("data\nruns\nb.*\n")
    for command in (
        ["git", "init", "-q"],
        ["dvc", "init", "-q"],
        ["git", "add", "."],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "toy"],
    ):
        subprocess.run(command, cwd=project, check=True)
    return project


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every clone uses as its DVC remote."""
    folder = tmp_path / "share"
    folder.mkdir()
    monkeypatch.setenv(data_remote.REMOTE, str(folder))
    monkeypatch.setenv(data_remote.PATIENCE, "0")
    return folder
