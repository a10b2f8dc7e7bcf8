"""Schedulers: the same graph, the same results, retries, blocking, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.records.records import RunDescription, open_record
from flows.running.dvc_repro import CpuSlots, DvcRunner
from flows.running.graph_walk import walk_graph
from flows.running.stage_runner import StageOutcome
from flows.versioning import graph as versioning
from flows.versioning.torn_files import clear_torn_rwlock


def runner_for(root: Path) -> DvcRunner:
    graph = versioning.stage_graph(root)
    record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
    stale = versioning.stale_stages(root, graph)
    return DvcRunner(root, graph, parent_record=record.record_id, stale=stale)


def statuses(outcomes: dict[str, StageOutcome]) -> dict[str, str]:
    return {name: outcome.status for name, outcome in outcomes.items()}


def test_the_second_run_skips_everything(toy: Path) -> None:
    seen: list[StageOutcome] = []
    outcomes = walk_graph(runner_for(toy), seen.append)
    # Toy stages report no outcome of their own, so a run looks like a restore.
    assert all(outcome.ok for outcome in outcomes.values())
    assert len(seen) == 4
    assert (toy / "data" / "d").read_text() == (toy / "data" / "a").read_text() * 2 + (
        "photographs\n"
    )
    assert set(statuses(walk_graph(runner_for(toy), seen.append)).values()) == {"skipped"}
    assert (toy / "b.runs").read_text().count("run") == 1


def test_a_failed_stage_is_retried_and_blocks_only_what_is_below(toy: Path) -> None:
    (toy / "b.fail").touch()
    outcomes = walk_graph(runner_for(toy), lambda outcome: None)
    assert outcomes["b"].status == "failed"
    assert "b" in outcomes["b"].message
    assert outcomes["c"].ok
    assert outcomes["d"].status == "blocked"
    assert (toy / "b.runs").read_text().count("run") == 2
    (toy / "b.fail").unlink()
    assert all(o.ok for o in walk_graph(runner_for(toy), lambda outcome: None).values())


@pytest.mark.parametrize(
    ("number", "said"),
    [(9, "by SIGKILL; where nobody did that, memory was full"), (11, "by SIGSEGV")],
)
def test_a_stage_that_a_signal_ended_says_which(toy: Path, number: int, said: str) -> None:
    graph = toy / "dvc.yaml"
    first = next(line for line in graph.read_text().splitlines() if line.strip().startswith("cmd:"))
    graph.write_text(graph.read_text().replace(first, f"    cmd: kill -{number} $$"))
    outcome = runner_for(toy).run("a")
    assert outcome.status == "failed"
    assert outcome.message == f"a: its process was ended {said} (log: runs/logs/a.log)"


def test_stopping_ends_the_whole_process_group(toy: Path) -> None:
    (toy / "b.hang").touch()
    runner = runner_for(toy)
    results: dict[str, StageOutcome] = {}
    thread = threading.Thread(
        target=lambda: results.update(walk_graph(runner, lambda outcome: None))
    )
    thread.start()
    deadline = time.monotonic() + 180
    while not _sleepers(toy) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _sleepers(toy)
    runner.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert results["b"].status == "failed"
    assert _sleepers(toy) == []


DRIVER = """
import sys
from pathlib import Path
from flows.versioning import graph as versioning
from flows.running.dvc_repro import DvcRunner
from flows.running.graph_walk import walk_graph
root = Path(sys.argv[1])
graph = versioning.stage_graph(root)
stale = versioning.stale_stages(root, graph)
walk_graph(DvcRunner(root, graph, parent_record="x", stale=stale), print)
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_killing_the_scheduler_leaves_no_stage_process_and_a_rerun_finishes(
    toy: Path, root: Path, how: signal.Signals
) -> None:
    (toy / "b.hang").touch()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(toy)],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # pytest-xdist workers may ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    deadline = time.monotonic() + 180
    while not _sleepers(toy) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _sleepers(toy)
    os.kill(driver.pid, how)
    driver.wait(60)
    deadline = time.monotonic() + 20
    while _sleepers(toy) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _sleepers(toy) == []
    (toy / "b.hang").unlink()
    assert all(o.ok for o in walk_graph(runner_for(toy), lambda outcome: None).values())


@pytest.mark.parametrize("torn", ["", pytest.param('{"write": {"', marks=pytest.mark.slow)])
def test_a_table_of_busy_paths_torn_by_a_kill_stops_nothing(toy: Path, torn: str) -> None:
    runner = runner_for(toy)
    # DVC rewrites this file in place: a kill between truncation and writing leaves it like this.
    (toy / ".dvc" / "tmp" / "rwlock").write_text(torn)
    assert all(outcome.ok for outcome in walk_graph(runner, lambda outcome: None).values())
    (toy / ".dvc" / "tmp" / "rwlock").write_text(torn)
    assert versioning.stale_stages(toy, versioning.stage_graph(toy)) == {}


def test_a_claim_of_a_running_process_is_kept(toy: Path) -> None:
    table = toy / ".dvc" / "tmp" / "rwlock"
    claim = f'{{"write": {{"data/a": {{"pid": {os.getpid()}, "cmd": "dvc repro"}}}}, "read": {{}}}}'
    table.write_text(claim)
    clear_torn_rwlock(toy)
    assert table.read_text() == claim


def _sleepers(root: Path) -> list[int]:
    """Processes of the hanging stage of this project."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.info["cmdline"] == ["sleep", "60"] and process.cwd() == str(root):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_cpu_slots_never_hand_out_more_than_there_are() -> None:
    slots = CpuSlots(2)
    held = 0
    most = 0
    guard = threading.Lock()

    def work(wanted: int) -> None:
        nonlocal held, most
        with slots.take(wanted):
            with guard:
                held += min(wanted, 2)
                most = max(most, held)
            time.sleep(0.01)
            with guard:
                held -= min(wanted, 2)

    # Some want more than there are, and get all of them.
    threads = [threading.Thread(target=work, args=(1 + i % 3,), daemon=True) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert held == 0
    assert most == 2


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is a small tmpfs, which needs root")
def test_a_full_disk_under_the_dvc_cache_costs_no_result(toy: Path) -> None:
    small = toy / ".dvc" / "cache"
    small.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        text = (toy / "dvc.yaml").read_text()
        (toy / "dvc.yaml").write_text(
            text.replace("cat data/a source > data/c", "yes | head -c 400000 > data/c")
        )
        outcomes = walk_graph(runner_for(toy), lambda outcome: None)
        assert outcomes["c"].status == "failed"
        assert "No space left on device" in outcomes["c"].message
        assert outcomes["d"].status == "blocked"
        # Somebody makes room.
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        outcomes = walk_graph(runner_for(toy), lambda outcome: None)
        assert all(outcome.ok for outcome in outcomes.values()), outcomes
        assert versioning.stale_stages(toy, versioning.stage_graph(toy)) == {}
        assert (toy / "data" / "c").stat().st_size == 400_000
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def claimed(toy: Path, path: str, kind: str) -> subprocess.Popen[bytes]:
    """A living process that says in DVC's table that it works on a path."""
    process = subprocess.Popen(["sleep", "600"])
    claim = {"pid": process.pid, "cmd": "dvc repro -s b"}
    place = str(toy / path)
    table = {"read": {}, "write": {}} | {kind: {place: [claim] if kind == "read" else claim}}
    folder = toy / ".dvc" / "tmp"
    folder.mkdir(exist_ok=True)
    (folder / "rwlock").write_text(json.dumps(table))
    return process


def test_a_stage_that_somebody_works_on_is_stale_and_hides_no_other(toy: Path) -> None:
    subprocess.run(["dvc", "repro", "-q"], cwd=toy, check=True)
    graph = versioning.stage_graph(toy)
    (toy / "source").write_text("others\n")
    process = claimed(toy, "data/b", "write")
    try:
        found = versioning.stale_stages(toy, graph)
    finally:
        process.kill()
        process.wait()
    # c reads the source; d reads b.
    assert found["b"] == versioning.BUSY
    assert set(found) == {"a", "b", "c", "d"}
    assert "source" in found["c"]


def test_a_reader_delays_a_stage_and_does_not_fail_it(toy: Path) -> None:
    process = claimed(toy, "data/a", "read")
    threading.Timer(2.0, process.kill).start()
    threading.Thread(target=process.wait, daemon=True).start()
    outcomes = walk_graph(runner_for(toy), lambda outcome: None)
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    assert outcomes["a"].seconds >= 2.0
