"""Stages in other clones: exact inputs, one version of everything, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.records.records import RunDescription, open_record
from flows.remote import data_remote, lock_entries
from flows.remote.remote_runner import RemoteRunner, checked_workers, send_present_results
from flows.remote.remote_stage import code_commit, run_remote_stage
from flows.remote.stage_messages import (
    StageReply,
    StageRequest,
    WorkerRefused,
    as_json,
    read_reply,
)
from flows.running.clone_lock import CloneBusy, clone_lock
from flows.running.runner import StageOutcome
from flows.running.scheduler import run_graph
from flows.versioning import graph as versioning


@pytest.fixture
def another(toy: Path) -> Callable[[str], Path]:
    """Makes clones of the toy project."""

    def make(name: str) -> Path:
        target = toy.parent / name
        subprocess.run(["git", "clone", "-q", str(toy), str(target)], check=True)
        (target / "data").mkdir()
        return target

    return make


def ask(worker: Path, pipeline: Path, name: str) -> StageReply:
    params = (pipeline / "params.yaml").read_text()
    request = StageRequest(name, code_commit(pipeline), params, versioning.read_lock(pipeline))
    return run_remote_stage(request, root=worker)


def repro(root: Path) -> None:
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def runner_for(root: Path, workers: list[Path], said: list[str] | None = None) -> RemoteRunner:
    graph = versioning.stage_graph(root)
    record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
    data_remote.configure(root)
    stale = lock_entries.stale_without_data(root, graph)
    send_present_results(root, stale)
    return RemoteRunner(
        root,
        graph,
        parent_record=record.record_id,
        stale=stale,
        workers=checked_workers(root, workers),
        say=(said if said is not None else []).append,
    )


def run_all(root: Path, workers: list[Path], said: list[str] | None = None) -> dict[str, Any]:
    return run_graph(runner_for(root, workers, said), lambda outcome: None)


def test_a_stage_gets_exactly_its_inputs_and_returns_its_lock_entry(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    repro(toy)
    send_present_results(toy, {})
    expected = versioning.read_lock(toy)
    reply = ask(worker, toy, "c")
    assert reply.entry == expected["c"]
    # Of what stages make, only what c reads and c itself; b is nowhere.
    assert {path.name for path in (worker / "data").iterdir()} == {"a", "c"}
    assert versioning.read_lock(worker)["c"] == expected["c"]


@pytest.mark.slow
def test_two_workers_make_the_bytes_and_the_lock_of_one_clone(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    quiet, first, second = another("quiet"), another("first"), another("second")
    repro(quiet)
    outcomes = run_all(toy, [first, second])
    assert {outcome.status for outcome in outcomes.values()} == {"skipped"}  # no stage reports here
    assert yaml.safe_load((toy / "dvc.lock").read_text()) == yaml.safe_load(
        (quiet / "dvc.lock").read_text()
    )
    assert lines(first / "b.runs") + lines(second / "b.runs") == 1
    graph = versioning.stage_graph(toy)
    assert lock_entries.stale_without_data(toy, graph) == {}
    # The pipeline's clone never had the data; now it asks for it.
    assert not (toy / "data" / "d").exists()
    subprocess.run(["dvc", "pull", "-q"], cwd=toy, check=True)
    assert (toy / "data" / "d").read_bytes() == (quiet / "data" / "d").read_bytes()
    assert versioning.stale_stages(toy, graph) == {}


@pytest.mark.slow
def test_settings_of_the_pipeline_reach_the_worker(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    for value in (2, 3):
        text = f"project: {{name: toy}}\nvalue: {value}\n"
        (toy / "params.yaml").write_text(text)
        reply = ask(worker, toy, "a")
        assert reply.entry is not None, reply.message
        assert reply.entry["params"]["params.yaml"] == {"value": value}
        assert (worker / "data" / "a").read_text() == text
    (worker / "params.yaml").write_text("value: my own\n")
    reply = ask(worker, toy, "a")
    assert reply.status == "refused"
    assert "edited by hand" in reply.message
    assert (worker / "params.yaml").read_text() == "value: my own\n"


def test_a_clone_with_other_code_is_refused_with_one_line(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    (worker / "source").write_text("edited\n")
    reply = ask(worker, toy, "a")
    assert reply.status == "refused"
    assert "changes that no commit has (source)" in reply.message
    with pytest.raises(WorkerRefused, match="changes that no commit has"):
        checked_workers(toy, [worker])
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, "commit", "-qam", "other"], cwd=worker, check=True)
    reply = ask(worker, toy, "a")
    assert reply.status == "refused"
    assert "is at commit" in reply.message
    assert "\n" not in reply.message
    with pytest.raises(WorkerRefused, match="git fetch"):
        checked_workers(toy, [worker])
    with pytest.raises(WorkerRefused, match="own clone"):
        checked_workers(toy, [toy])
    with pytest.raises(WorkerRefused, match="no clone"):
        checked_workers(toy, [toy.parent])
    with pytest.raises(WorkerRefused, match="at least one"):
        checked_workers(toy, [])


def test_an_input_that_nobody_versions_is_one_clear_line(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    text = (toy / "dvc.yaml").read_text().replace("deps: [source]", "deps: [source, private]", 1)
    (toy / "dvc.yaml").write_text(text)
    (toy / ".gitignore").write_text((toy / ".gitignore").read_text() + "private\n")
    (toy / "private").write_text("mine")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, "commit", "-qam", "private"], cwd=toy, check=True)
    reply = ask(another("worker"), toy, "a")
    assert reply.status == "refused"
    assert "private is not in" in reply.message
    assert "dvc add private" in reply.message


@pytest.mark.slow
def test_a_stage_that_fails_is_a_reply_and_blocks_what_is_below(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    (worker / "b.fail").touch()
    outcomes = run_all(toy, [worker])
    assert outcomes["b"].status == "failed"
    assert outcomes["d"].status == "blocked"
    assert lines(worker / "b.runs") == 2  # one retry
    assert set(versioning.read_lock(toy)) == {"a", "c"}


def sleepers(*clones: Path) -> list[psutil.Process]:
    """Hanging stages of these clones."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.info["cmdline"] == ["sleep", "60"] and Path(process.cwd()) in clones:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value
    return value


class Running:
    """A pipeline run in a thread."""

    def __init__(self, root: Path, workers: list[Path]) -> None:
        self.said: list[str] = []
        self.runner = runner_for(root, workers, self.said)
        self.outcomes: dict[str, StageOutcome] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.outcomes = run_graph(self.runner, lambda outcome: None)

    def end(self) -> dict[str, StageOutcome]:
        self._thread.join(240)
        assert not self._thread.is_alive()
        return self.outcomes


def request_processes(clone: Path) -> list[psutil.Process]:
    """The process in `clone` that answers a request (not its launcher, not its stage)."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            command = process.info["cmdline"] or []
            if process.cwd() == str(clone) and command[1:3] == ["-m", "flows.cli"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_killed_workers_stage_goes_to_the_other_one(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    quiet, clones = another("quiet"), [another("first"), another("second")]
    repro(quiet)
    for clone in clones:
        (clone / "b.hang").touch()
    run = Running(toy, clones)
    victim = Path(wait_for(lambda: sleepers(*clones))[0].cwd())
    (other,) = [clone for clone in clones if clone != victim]
    (other / "b.hang").unlink()
    for process in request_processes(victim):
        process.kill()
    outcomes = run.end()
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    assert run.said == [f"b: worker {victim} ended without an answer; sent to another one"]
    assert lines(victim / "b.runs") == lines(other / "b.runs") == 1
    assert versioning.read_lock(toy) == versioning.read_lock(quiet)
    wait_for(lambda: not sleepers(*clones), 30)
    # The clone of the dead worker takes stages again.
    (victim / "b.hang").unlink()
    assert ask(victim, toy, "b").entry == versioning.read_lock(quiet)["b"]


@pytest.mark.slow
def test_a_stage_that_every_worker_loses_fails_and_says_so(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    (worker / "b.hang").touch()
    run = Running(toy, [worker])
    for _ in range(2):  # once more after the failure, as its meta allows
        process = wait_for(lambda: sleepers(worker))[0]
        for one in request_processes(worker):
            one.kill()
        wait_for(lambda process=process: not process.is_running())
    outcomes = run.end()
    assert outcomes["b"].message == f"b: lost with its worker {worker} (log: runs/logs/b.log)"
    assert outcomes["c"].ok


@pytest.mark.slow
def test_stopping_the_pipeline_stops_the_stage_in_the_worker(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    (worker / "b.hang").touch()
    run = Running(toy, [worker])
    wait_for(lambda: sleepers(worker))
    run.runner.stop()
    assert run.end()["b"].status == "failed"
    wait_for(lambda: not sleepers(worker), 30)
    wait_for(lambda: not request_processes(worker), 30)


@pytest.mark.slow
def test_a_result_waits_in_its_clone_until_the_remote_is_back(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    first, second = clones = [another("first"), another("second")]
    for clone in clones:
        (clone / "b.hang").touch()
    run = Running(toy, clones)
    (sleeper,) = wait_for(lambda: sleepers(*clones))
    holder = Path(sleeper.cwd())
    # c has to be through before the share goes away.
    wait_for(lambda: "c" in versioning.read_lock(toy))
    away = share.rename(share.with_name("away"))
    sleeper.kill()
    outcomes = run.end()
    assert outcomes["b"].status == "failed"
    assert f"done and kept in {holder}, not sent yet" in outcomes["b"].message
    assert "is no folder here" in outcomes["b"].message
    assert "b" not in versioning.read_lock(toy)
    runs = lines(first / "b.runs") + lines(second / "b.runs")
    away.rename(share)
    for clone in clones:
        (clone / "b.hang").unlink()
    outcomes = run_all(toy, clones)
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    # Not computed again: sent from where it lay.
    assert lines(first / "b.runs") + lines(second / "b.runs") == runs == 1
    assert str(holder) in outcomes["b"].message


@pytest.mark.slow
def test_a_remote_that_comes_back_in_time_is_only_a_pause(
    toy: Path, another: Callable[[str], Path], share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data_remote.PATIENCE, "120")
    worker = another("worker")
    away = share.rename(share.with_name("away"))
    back = threading.Timer(4, lambda: away.rename(share))
    back.start()
    assert ask(worker, toy, "a").entry is not None
    back.join()


def test_an_input_that_the_remote_lacks_is_named(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    repro(toy)
    reply = ask(another("worker"), toy, "c")
    assert reply.status == "failed"
    assert "lacks data/a" in reply.message
    assert "dvc push" in reply.message


def test_a_request_that_cannot_be_read_is_a_refusal_not_a_silence(
    toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "request.json").write_text('{"protocol": 0}')
    arguments = ["stage", "remote", str(tmp_path / "request.json")]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--reply", str(tmp_path / "reply.json")],
        cwd=toy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    reply = read_reply(json.loads((tmp_path / "reply.json").read_text()))
    assert reply.status == "refused"
    assert "protocol 0" in reply.message


def test_a_clone_that_another_run_has_is_given_back_when_patience_ends(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    said: list[str] = []
    with clone_lock(worker, print):
        request = StageRequest("a", code_commit(toy), "", patience_s=0.0)
        reply = run_remote_stage(request, root=worker, say=said.append)
        with pytest.raises(CloneBusy), clone_lock(worker, said.append, patience_s=0):
            pass
    assert reply.status == "busy"
    assert "works in" in reply.message
    assert len(said) == 2
    assert not (worker / "data" / "a").exists()


DRIVER = """
import sys
from pathlib import Path
from flows import versioning
from flows.clones import lock_entries
from flows.running.clone_lock import CloneBusy, clone_lock
from flows.remote.remote_requests import PipelineClone
from flows.remote.remote_runner import RemoteRunner
from flows.running.scheduler import run_graph
root, worker = Path(sys.argv[1]), Path(sys.argv[2])
with clone_lock(root, print) as held:
    graph = versioning.stage_graph(root)
    runner = RemoteRunner(
        root, graph, parent_record="x", stale=lock_entries.stale_without_data(root, graph),
        workers=[worker], say=print, held=(held,),
    )
    run_graph(runner, print)
"""


@pytest.mark.slow
def test_killing_the_pipeline_ends_its_stages_in_the_workers_before_anything_else_starts(
    toy: Path, another: Callable[[str], Path], share: Path, root: Path
) -> None:
    worker = another("worker")
    (worker / "b.hang").touch()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(toy), str(worker)], cwd=root, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: sleepers(worker))
    driver.kill()
    driver.wait(60)
    # The worker's clone is held until the last process of the stage is gone.
    with clone_lock(worker, lambda line: None):
        assert sleepers(worker) == []
    with clone_lock(toy, lambda line: None):
        assert request_processes(worker) == []
    (worker / "b.hang").unlink()
    assert all(outcome.ok for outcome in run_all(toy, [worker]).values())


@pytest.mark.slow
def test_an_s3_server_that_is_down_is_one_line_and_costs_no_result(
    toy: Path, monkeypatch: pytest.MonkeyPatch, another: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: closed
    monkeypatch.setenv(data_remote.REMOTE, "s3://corpus/data")
    monkeypatch.setenv(data_remote.PATIENCE, "0")
    worker = another("worker")
    reply = ask(worker, toy, "a")
    assert reply.status == "unpushed"
    assert "\n" not in reply.message
    assert "s3://corpus/data" in reply.message
    assert "127.0.0.1:9" in reply.message
    assert (worker / "data" / "a").is_file()


@pytest.mark.slow
def test_requests_and_replies_are_json_over_standard_input_and_output(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    repro(toy)
    send_present_results(toy, {})
    request = StageRequest(
        "c",
        code_commit(toy),
        (toy / "params.yaml").read_text(),
        lock_entries.needed_entries(versioning.stage_graph(toy), versioning.read_lock(toy), "c"),
    )
    assert set(request.lock) == {"a", "c"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "stage", "remote", "-"],
        cwd=another("worker"),
        input=json.dumps(as_json(request)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entry"] == versioning.read_lock(toy)["c"]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "stage", "remote", "-"],
        cwd=toy.parent / "worker",
        input=json.dumps(as_json(request) | {"commit": "0" * 40}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: c: ")
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["status"] == "refused"
