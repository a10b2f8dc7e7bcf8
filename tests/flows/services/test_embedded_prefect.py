"""The Prefect server of one run, killed before it answers for the first time."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows.services.embedded_prefect import embedded_prefect
from flows.services.servers import ServiceEnded


@contextmanager
def killed_at_start(times: int) -> Iterator[list[int]]:
    """Send SIGKILL to the first so many servers that this process starts, as soon as seen."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and len(killed) < times:
            for child in psutil.Process().children(recursive=True):
                try:
                    if "prefect server start" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
                        child.wait(10)
                except (psutil.Error, psutil.TimeoutExpired):
                    continue
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a server writes there goes with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.mark.usefixtures("own_environment")
def test_a_server_that_is_killed_while_it_starts_is_started_once_more(
    toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with killed_at_start(1) as killed, embedded_prefect(toy) as clients:
        with urllib.request.urlopen(f"{clients['PREFECT_API_URL']}/health", timeout=30) as answer:
            assert answer.status == 200
        assert os.environ["PREFECT_API_URL"] == clients["PREFECT_API_URL"]
    assert len(killed) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "prefect ended while starting; see" in line
    assert line.endswith("started once more")


@pytest.mark.usefixtures("own_environment")
def test_a_server_that_cannot_start_is_tried_twice(toy: Path) -> None:
    with (
        killed_at_start(2) as killed,
        pytest.raises(ServiceEnded, match="ended while starting; see"),
        embedded_prefect(toy),
    ):
        pytest.fail("a server that was killed answers")
    assert len(killed) == 2
