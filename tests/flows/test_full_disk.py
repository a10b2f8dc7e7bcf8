"""A disk that is full from the first moment is one line, whichever library meets it first."""

from __future__ import annotations

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
