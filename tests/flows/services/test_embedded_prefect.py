"""The Prefect server of one run, killed before it answers for the first time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import psutil
import pytest

from flows.services.embedded_prefect import embedded_prefect, nobody_listens
from flows.services.servers import ServiceEnded


@contextmanager
def server_killed_at_start(above: int) -> Iterator[list[int]]:
    """Send SIGKILL to the first Prefect server below a process as soon as it is seen."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and not killed:
            for child in psutil.Process(above).children(recursive=True):
                try:
                    if "prefect server start" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
                except psutil.Error:
                    continue
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_a_server_that_is_killed_while_it_starts_is_nobodys_address(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        server_killed_at_start(os.getpid()) as killed,
        pytest.raises(ServiceEnded, match="prefect ended while starting; see"),
        embedded_prefect(toy),
    ):
        pytest.fail("a server that was killed answers")
    assert killed
    assert "PREFECT_API_URL" not in os.environ


@pytest.mark.slow
def test_a_run_whose_server_is_killed_while_it_starts_goes_on_without_it(
    trivial_clone: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    project = trivial_clone(tmp_path, 1)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    run = Popen(
        ["ultraflux", "run", "--engine", "prefect", "--no-rehearsal"],
        cwd=project,
        env=own | {"PYTHONPATH": str(project)},
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    with server_killed_at_start(run.pid) as killed:
        said, _ = run.communicate(timeout=300)
    assert killed
    assert run.returncode == 0, said
    (line,) = [line for line in said.splitlines() if "goes on without it" in line]
    assert line.startswith("prefect ended while starting; see ")
    assert (project / "data" / "ingest" / "out").is_file()
    assert "Traceback" not in said


def test_a_server_that_is_killed_under_a_run_is_not_waited_for_at_its_end(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    try:
        with embedded_prefect(toy):
            assert not nobody_listens.is_set()
            with server_killed_at_start(os.getpid()) as killed:
                while not killed:
                    time.sleep(0.05)
        # The command then ends without the threads of Prefect's client, which still call it.
        assert nobody_listens.is_set()
    finally:
        nobody_listens.clear()
