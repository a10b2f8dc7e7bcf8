"""A disk that is full from the first moment is one line, whichever library meets it first."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest


def _nothing_fits() -> None:
    """No file may grow: what a full disk or a used-up quota says, without root."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))


@pytest.mark.parametrize("command", [["stage", "list"], ["run"]])
def test_a_full_disk_is_one_line(toy: Path, root: Path, command: list[str]) -> None:
    # Its stages take the settings of the project.
    (toy / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    done = subprocess.run(
        ["ultraflux", *command],
        cwd=toy,
        preexec_fn=_nothing_fits,
        capture_output=True,
        text=True,
    )
    assert done.returncode not in {0, -25}
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr


def test_a_module_that_a_full_disk_cut_off_is_named_once_and_then_works(
    toy: Path, tmp_path: Path
) -> None:
    """With compiled modules in a folder of its own: others use those of the clone."""
    env = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)

    def listed() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ultraflux", "stage", "list"], cwd=toy, env=env, capture_output=True, text=True
        )

    assert listed().returncode == 0
    (compiled,) = (tmp_path / "compiled").rglob("flows/versioning/graph.*.pyc")
    os.truncate(compiled, 4096)
    done = listed()
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    said = f"error: {compiled} was cut off, as by a full disk; it is removed: run this again"
    assert said in done.stderr.splitlines()
    assert listed().returncode == 0
