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
from flows.records.records import (
    RunDescription,
    RunResult,
    all_records,
    open_record,
    read_json,
    write_json,
)

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
    write_json(record.folder / OWNER_FILE, values | {"started": values["started"] - 60, "ticks": 1})
    record.finish(RunResult(status="FINISHED"))
    assert close_ownerless(tmp_path) == []
    assert record.result is not None
    assert record.result.status == "FINISHED"


def test_who_is_gone() -> None:
    me = Owner.of_this_process()
    assert not me.is_gone()
    # Its id was given to another process since.
    assert replace(me, ticks=1).is_gone()
    unused = next(pid for pid in range(2**22 - 1, 2, -1) if not psutil.pid_exists(pid))
    assert replace(me, pid=unused).is_gone()
    # The clock was set, by hand or by the network.
    assert not replace(me, started=me.started - 30).is_gone()
    # The machine has another name now, and had another boot.
    assert replace(me, pid=unused, host="before").is_gone()
    assert replace(me, boot="earlier").is_gone()
    # Other machines' and containers' processes cannot be seen here.
    for other in (
        replace(me, host="elsewhere", boot="another"),
        replace(me, machine="another", boot="another"),
        replace(me, host="elsewhere", namespace="pid:[1]"),
        replace(me, namespace="pid:[1]"),
    ):
        assert not replace(other, pid=unused).is_gone()


def test_a_process_that_has_ended_and_that_nobody_has_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    owner = replace(Owner.of_this_process(), pid=process.pid, started=started, ticks=None)
    assert not owner.is_gone()
    process.kill()
    # Its entry stays in the kernel's table until this process asks.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(process.pid)
    assert owner.is_gone()
    process.communicate()


def test_notes_of_older_code_are_read() -> None:
    me = Owner.of_this_process()
    older = Owner.read({"host": me.host, "pid": me.pid, "started": me.started})
    assert older is not None
    assert not older.is_gone()
    assert replace(older, started=me.started - 60).is_gone()
    assert not replace(older, started=me.started - 60, host="elsewhere").is_gone()


@pytest.mark.parametrize(
    ("before", "setting"),
    [
        ("-m", "sed 's/^btime .*/btime 1000000000/' /proc/stat > $1; mount --bind $1 /proc/stat"),
        ("-u", "hostname renamed"),
    ],
)
def test_a_set_clock_and_a_new_host_name_close_who_was_killed_alone(
    toy: Path, tmp_path: Path, before: str, setting: str
) -> None:
    command = ["unshare", before, "bash", "-ec"]
    if subprocess.run(
        [*command, setting, "-", str(tmp_path / "try")], capture_output=True
    ).returncode:
        pytest.skip("neither may be changed here")
    mine = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    own_record(toy, mine.record_id)
    subprocess.run([sys.executable, "-c", OPENS, str(toy)], capture_output=True)
    typed = f'{setting}; exec "$2" -m flows.cli status'
    words = [*command, typed, "-", str(tmp_path / "stat"), sys.executable]
    done = subprocess.run(words, cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = {r.run.name: r.result and r.result.status for r in all_records(toy)}
    assert ended == {"pipeline": None, "vae": "KILLED"}


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"host": "a"},
        {"host": "a", "pid": "x"},
        {"host": "a", "pid": -1, "started": 1},
        [1],
    ],
)
def test_a_damaged_owner_is_nobody(values: object) -> None:
    assert Owner.read(values) is None
