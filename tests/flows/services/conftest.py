"""Processes that stand in for servers and workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows.services.clone_processes import start_detached


@pytest.fixture
def begin_sleeper() -> Iterator[Callable[..., psutil.Process]]:
    """Begins processes as `up` does, which last as long as the test: `begin_sleeper(root, "word")`.

    The words stand on the command line.
    """
    begun: list[psutil.Process] = []

    def begin(root: Path, *words: str) -> psutil.Process:
        command = [sys.executable, "-c", "import time; time.sleep(600)", *words]
        log = root.parent / "sleeper.log"
        begun.append(psutil.Process(start_detached(command, log, dict(os.environ), cwd=root)))
        return begun[-1]

    yield begin
    for process in begun:
        with suppress(psutil.NoSuchProcess):
            process.kill()
