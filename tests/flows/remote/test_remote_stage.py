"""Stages in other clones: exact inputs, one version of everything, nothing lost."""

from __future__ import annotations

import json
import queue
import signal
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
from flows.remote.remote_requests import PipelineClone, send_present_results
from flows.remote.remote_stage import code_commit, run_remote_stage
from flows.remote.stage_messages import (
    StageReply,
    StageRequest,
    as_json,
    read_reply,
    read_request,
)
from flows.running.clone_lock import CloneBusy, clone_lock
from flows.running.graph_walk import walk_graph
from flows.running.stage_runner import StageOutcome
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


def through_json(message: StageRequest | StageReply) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(as_json(message)))
    return values


class Carrier:
    """Carries a pipeline's messages to clones and back: a call here, a server between machines."""

    stopping = False

    def __init__(self, root: Path, workers: list[Path]) -> None:
        self.root = root
        self.graph = versioning.stage_graph(root)
        record = open_record(root, RunDescription(kind="pipeline", name="pipeline"))
        data_remote.configure(root)
        self.stale = lock_entries.stale_without_data(root, self.graph)
        send_present_results(root, self.stale)
        self.clone = PipelineClone(
            root,
            self.graph,
            parent_record=record.record_id,
            force=False,
            stopping=lambda: self.stopping,
        )
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(worker)

    def run(self, name: str, *, prefect_run: str | None = None) -> StageOutcome:
        if name not in self.stale:
            return StageOutcome(name, "skipped", message="unchanged")
        worker = self._free.get()
        try:
            request = read_request(through_json(self.clone.request(name)))
            reply = run_remote_stage(request, root=worker, own_signals=False)
        finally:
            self._free.put(worker)
        return self.clone.accept(name, read_reply(through_json(reply)), str(worker))

    def start(self, name: str, worker: Path) -> subprocess.Popen[str]:
        """The same in a process of its own, which can be killed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "stage", "remote", "-"],
            cwd=worker,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(as_json(self.clone.request(name))))
        process.stdin.close()
        # `communicate` would flush what is closed.
        process.stdin = None
        return process

    def stop(self) -> None:
        self.stopping = True

    def running(self) -> list[str]:
        return []

    def progress_file(self, name: str) -> Path:
        return self.root / "runs" / "progress" / f"{name}.json"


def run_all(root: Path, workers: list[Path]) -> dict[str, StageOutcome]:
    return walk_graph(Carrier(root, workers), lambda outcome: None)


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
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, "commit", "-qam", "other"], cwd=worker, check=True)
    reply = ask(worker, toy, "a")
    assert reply.status == "refused"
    assert "is at commit" in reply.message
    assert "\n" not in reply.message
    assert "git fetch" in reply.message


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


@pytest.mark.slow
def test_a_killed_workers_stage_ends_with_it_and_another_clone_makes_the_same_bytes(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    quiet, victim, other = another("quiet"), another("victim"), another("other")
    repro(quiet)
    (victim / "b.hang").touch()
    carrier = Carrier(toy, [other])
    assert carrier.run("a").ok
    process = carrier.start("b", victim)
    wait_for(lambda: sleepers(victim))
    process.kill()
    process.communicate(timeout=60)
    # The clone of the dead worker is held until the last process of its stage is gone.
    with clone_lock(victim, lambda line: None):
        assert sleepers(victim) == []
    outcomes = run_all(toy, [other])
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    assert lines(victim / "b.runs") == lines(other / "b.runs") == 1
    assert versioning.read_lock(toy) == versioning.read_lock(quiet)
    # It takes stages again.
    (victim / "b.hang").unlink()
    assert ask(victim, toy, "b").entry == versioning.read_lock(quiet)["b"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_what_answers_a_request_stops_its_stage(
    toy: Path, another: Callable[[str], Path], share: Path, how: signal.Signals
) -> None:
    worker = another("worker")
    carrier = Carrier(toy, [worker])
    assert carrier.run("a").ok
    (worker / "b.hang").touch()
    process = carrier.start("b", worker)
    wait_for(lambda: sleepers(worker))
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "what the stage saved stays" in said
    assert sleepers(worker) == []


@pytest.mark.slow
def test_a_result_waits_in_its_clone_until_the_remote_is_back(
    toy: Path, another: Callable[[str], Path], share: Path
) -> None:
    worker = another("worker")
    (worker / "b.hang").touch()
    carrier = Carrier(toy, [worker])
    assert carrier.run("a").ok
    process = carrier.start("b", worker)
    (sleeper,) = wait_for(lambda: sleepers(worker))
    away = share.rename(share.with_name("away"))
    sleeper.kill()
    answer, _ = process.communicate(timeout=60)
    outcome = carrier.clone.accept("b", read_reply(json.loads(answer)), str(worker))
    assert outcome.status == "failed"
    assert f"done and kept in {worker}, not sent yet" in outcome.message
    assert "is no folder here" in outcome.message
    assert "b" not in versioning.read_lock(toy)
    assert lines(worker / "b.runs") == 1
    away.rename(share)
    (worker / "b.hang").unlink()
    outcomes = run_all(toy, [worker])
    assert all(outcome.ok for outcome in outcomes.values()), outcomes
    # Not computed again: sent from where it lay.
    assert lines(worker / "b.runs") == 1
    assert str(worker) in outcomes["b"].message


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
