"""What was killed is not taken for running for ever; what runs is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flows.records.owners import (
    OWNER_FILE,
    Owner,
    close_ownerless,
    forget_flow_run,
    note_flow_run_end,
    own_flow_run,
    own_record,
    ownerless_flow_runs,
)
from flows.records.records import RunDescription, RunResult, open_record, read_json, write_json

OPENS = """
import os, signal, sys
from pathlib import Path
from flows.records.owners import own_flow_run, own_record
from flows.records.records import RunDescription, open_record
root = Path(sys.argv[1])
record = open_record(root, RunDescription(kind="stage", name="vae", stage_key="k"))
own_record(root, record.record_id)
own_flow_run(root, "killed-run")
print(record.record_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_closed_at_the_next_look_and_can_still_be_gone_on_with(
    tmp_path: Path, root: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPENS, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    mine = open_record(tmp_path, RunDescription(kind="pipeline", name="pipeline"))
    own_record(tmp_path, mine.record_id)
    own_flow_run(tmp_path, "my-run")
    assert list(ownerless_flow_runs(tmp_path)) == [("killed-run", None)]
    note_flow_run_end(tmp_path, "killed-run", "COMPLETED", "all ran")
    assert list(ownerless_flow_runs(tmp_path)) == [("killed-run", ("COMPLETED", "all ran"))]
    assert close_ownerless(tmp_path) == ["vae"]
    assert close_ownerless(tmp_path) == []
    assert mine.result is None
    again = open_record(tmp_path, RunDescription(kind="stage", name="vae", stage_key="k"))
    assert again.record_id == done.stdout.strip()
    assert again.run.attempts == 2
    forget_flow_run(tmp_path, "killed-run")
    assert list(ownerless_flow_runs(tmp_path)) == []


def test_a_run_that_ended_keeps_its_result(tmp_path: Path) -> None:
    record = open_record(tmp_path, RunDescription(kind="pipeline", name="pipeline"))
    own_record(tmp_path, record.record_id)
    values = read_json(record.folder / OWNER_FILE)
    write_json(record.folder / OWNER_FILE, values | {"started": values["started"] - 60})
    record.finish(RunResult(status="FINISHED"))
    assert close_ownerless(tmp_path) == []
    assert record.result is not None
    assert record.result.status == "FINISHED"


def test_who_is_gone() -> None:
    me = Owner.of_this_process()
    assert not me.is_gone()
    # Its id was given to another process since.
    assert replace(me, started=me.started - 60).is_gone()
    unused = next(pid for pid in range(2**22 - 1, 2, -1) if not psutil.pid_exists(pid))
    assert replace(me, pid=unused).is_gone()
    # Another machine's processes cannot be seen here.
    assert not replace(me, pid=unused, host="elsewhere").is_gone()


def test_a_process_that_has_ended_and_that_nobody_has_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(
        Owner.of_this_process(), pid=process.pid, started=psutil.Process(process.pid).create_time()
    )
    assert not owner.is_gone()
    process.kill()
    # Its entry stays in the kernel's table until this process asks.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(process.pid)
    assert owner.is_gone()
    process.communicate()


@pytest.mark.parametrize("values", [None, {}, {"host": "a"}, {"host": "a", "pid": "x"}, [1]])
def test_a_damaged_owner_is_nobody(values: object) -> None:
    assert Owner.read(values) is None
