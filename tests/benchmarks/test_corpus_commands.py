"""Every corpus command runs over the benchmark's tables, as a person types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import corpus_commands
import pytest


@pytest.mark.slow
def test_every_command_ends_well_and_within_its_memory(tmp_path: Path) -> None:
    command = [sys.executable, corpus_commands.__file__, "--rows", "3000", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, _, *lines = done.stdout.splitlines()
    found = {line.split()[0]: line.split() for line in lines}
    assert list(found) == list(corpus_commands.COMMANDS), done.stdout
    for name, (_, code, _, _, peak_gib, _) in found.items():
        assert int(code) == (name == "diff"), done.stdout
        assert float(peak_gib) < 1.0, done.stdout
