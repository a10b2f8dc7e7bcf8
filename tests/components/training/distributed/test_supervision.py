"""Launched ranks that fail, are killed, or stand still; small programs instead of training."""

from __future__ import annotations

import json
import socket
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.settings.runtime import RuntimeSettings
from components.settings.schema import load_settings
from components.training.distributed.supervision import (
    RankFailure,
    TrainingFailed,
    TrainingRefused,
    launch,
    restarts,
    torchrun_command,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[4]
PREAMBLE = """
import json
import os, signal, sys, time
from pathlib import Path
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
"""


@pytest.fixture
def runtime() -> RuntimeSettings:
    settings = load_settings(ROOT / "params.yaml").runtime
    return settings.model_copy(update={"processes": 2, "max_restarts": 1})


@pytest.fixture
def run(tmp_path, monkeypatch, runtime):
    """Launch a program in two ranks."""

    def launched(program: str, **changes: object) -> Path:
        (tmp_path / "ranks_program.py").write_text(PREAMBLE + textwrap.dedent(program))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        state = tmp_path / "state"
        launch("ranks_program", [], runtime.model_copy(update=changes), state)
        return state

    return launched


def test_a_killed_rank_is_started_again_with_the_others_and_named(run, tmp_path):
    state = run(
        f"""
        if attempt == 0:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        Path("{tmp_path}", str(rank)).touch()
        """
    )
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
    assert restarts(state) == [RankFailure(0, 1, "ended by SIGKILL")]


def test_a_failure_that_would_come_back_ends_the_run_without_a_restart(run, tmp_path, capfd):
    with pytest.raises(TrainingRefused, match=r"^rank 1: ValueError: batch 3 (.*logs: .*0001)"):
        run(
            f"""
            Path("{tmp_path}", f"{{rank}}-{{attempt}}").touch()
            from components.training.distributed.supervision import reporting_failures
            with reporting_failures((ValueError,)):
                if rank == 1:
                    raise ValueError("batch 3 does not divide")
                time.sleep(60)
            """
        )
    assert restarts(tmp_path / "state") == []
    # It is the launcher's one line; where it came from stands in the logs.
    assert "Traceback" not in capfd.readouterr().err
    (report,) = (tmp_path / "state").rglob("error.json")
    assert "Traceback" in json.loads(report.read_text())["message"]["extraInfo"]["py_callstack"]


def test_ranks_that_keep_failing_end_with_the_first_ones_words_and_the_count(run, tmp_path):
    with pytest.raises(TrainingFailed, match=r"^rank 0: OSError: no such disk after 1 restarts"):
        run(
            """
            from components.training.distributed.supervision import reporting_failures
            with reporting_failures((ValueError,)):
                # The others are ended with the first, so nobody waits this long.
                time.sleep(100 * rank)
                raise OSError("no such disk")
            """
        )
    assert [str(failure) for failure in restarts(tmp_path / "state")] == [
        "rank 0: OSError: no such disk"
    ]


def test_ranks_that_stand_still_are_killed_and_started_again(run):
    state = run(
        """
        if attempt == 0:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(300)
        """,
        collective_timeout_minutes=0.15,
    )
    assert [failure.reason for failure in restarts(state)] == ["no rank has moved for 0.15 minutes"]


def test_an_end_without_a_report_shows_the_last_line_of_that_rank(run):
    with pytest.raises(TrainingFailed, match="rank 1: exit 3: the last words"):
        run(
            """
            if rank == 1:
                print("the last words", file=sys.stderr)
                sys.exit(3)
            time.sleep(60)
            """,
            max_restarts=0,
        )


def test_several_nodes_meet_at_the_named_endpoint(runtime, tmp_path):
    several = runtime.model_copy(update={"nodes": 2, "rendezvous_endpoint": "node1:29400"})
    command = torchrun_command(several, tmp_path)
    assert "--nnodes=2" in command
    assert "--rdzv-endpoint=node1:29400" in command
    assert not any("127.0.0.1" in part for part in command)


def test_two_launchers_are_two_nodes_of_one_run(tmp_path, monkeypatch, runtime):
    # A rank of the second attempt shows that the nodes also meet again after a failure.
    (tmp_path / "ranks_program.py").write_text(
        PREAMBLE
        + textwrap.dedent(
            f"""
            if attempt == 0 and rank == 1:
                sys.exit(1)
            if attempt == 0:
                time.sleep(60)
            Path("{tmp_path}", f"{{rank}} of {{os.environ['WORLD_SIZE']}}").touch()
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    node = runtime.model_copy(
        update={"processes": 1, "nodes": 2, "rendezvous_endpoint": endpoint, "max_restarts": 2}
    )
    with ThreadPoolExecutor(2) as nodes:
        done = [
            nodes.submit(launch, "ranks_program", [], node, tmp_path / "state", joins=joins)
            for joins in (False, True)
        ]
        for launched in done:
            launched.result()
    assert (tmp_path / "0 of 2").exists()
    assert (tmp_path / "1 of 2").exists()
    # The node whose rank failed notes it, the other one only starts its rank again.
    noted = list((tmp_path / "state").rglob("restarts.jsonl"))
    assert len(noted) == 1
    assert "local rank 0: exit 1" in noted[0].read_text()


def test_nodes_without_a_meeting_point_are_refused():
    values = load_settings(ROOT / "params.yaml").runtime.model_dump() | {"nodes": 2}
    with pytest.raises(ValueError, match="rendezvous_endpoint"):
        RuntimeSettings.model_validate(values)
