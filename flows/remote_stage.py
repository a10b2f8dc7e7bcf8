"""One stage in a clone on another machine: pull its inputs, run it, push its outputs.

The answer is the stage's entry of dvc.lock with what its run recorded; the pipeline that asked
merges both (`flows.remote_runner`). Requests and replies are JSON, so any executor can carry them:
`ultraflux stage remote` here, a Prefect deployment, ssh. DVC alone would not do: `repro --pull` and
`--allow-missing` on a machine without the dependencies silently keep old results.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from flows import data_remote, versioning
from flows.clone_lock import clone_lock
from flows.lock_entries import foreign_inputs, merge_entries
from flows.records import Record, read_json, records_dir, write_json
from flows.runner import StageOutcome, StageRunner, stopping_on_signals
from flows.tracking import UploaderProcess

PROTOCOL = 1
PARAMS_PLACED = "runs/remote/params.sha256"
TRACKING_URI = "MLFLOW_TRACKING_URI"
IMAGE_STORE = "data/images"
IMAGE_STORE_READER = "components/corpus/original_lookup.py"

ReplyStatus = Literal["ran", "skipped", "failed", "refused", "unpushed"]


@dataclass(frozen=True)
class StageRequest:
    """What a worker is asked to do."""

    name: str
    commit: str
    """Commit at which the worker's clone must be."""
    params: str
    """Text of params.yaml."""
    lock: dict[str, Any] = field(default_factory=dict)
    """Entries of dvc.lock by stage: all that the stage stands on, and its own last one."""
    force: bool = False
    parent: str = ""
    """Record id of the pipeline run."""
    parent_run: str | None = None
    """Its run id in MLflow, where the worker can reach the same server."""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class StageReply:
    """How it went."""

    status: ReplyStatus
    """`unpushed`: it ran and its results are safe in this clone, but the remote is away."""
    message: str = ""
    seconds: float = 0.0
    entry: dict[str, Any] | None = None
    """The stage's entry of dvc.lock, once its outputs are in the remote."""
    files: dict[str, str] = field(default_factory=dict)
    """The run's record: base64 by path below the repository root."""
    protocol: int = PROTOCOL


class WorkerRefused(RuntimeError):
    """This clone cannot answer the request; one line."""


def read_request(values: Mapping[str, Any]) -> StageRequest:
    """A request from its JSON.

    Raises:
        WorkerRefused: another protocol, or fields that this one does not have.
    """
    if values.get("protocol") != PROTOCOL:
        raise WorkerRefused(
            f"the request speaks protocol {values.get('protocol')}, this clone {PROTOCOL}: bring "
            "both to one commit"
        )
    try:
        return StageRequest(**values)
    except TypeError as problem:
        raise WorkerRefused(f"not a stage request: {problem}") from None


def run_remote_stage(
    name: str,
    lock: dict[str, Any],
    params: str,
    commit: str,
    *,
    root: Path,
    parent: str = "",
    parent_run: str | None = None,
    force: bool = False,
) -> StageReply:
    """Run stage `name` in the clone at `root` for a pipeline elsewhere.

    Args:
        name: stage in dvc.yaml.
        lock: entries of dvc.lock that it stands on (`flows.lock_entries.needed_entries`).
        params: text of params.yaml.
        commit: commit of the pipeline's clone.
        root: the worker's clone; one stage at a time works in it, a second waits.
        parent: record id of the pipeline run.
        parent_run: the pipeline's run id in MLflow; with MLFLOW_TRACKING_URI set, the worker sends
            curves there while it runs.
        force: run even when nothing changed.

    Returns:
        The reply; a stage that fails is a reply, not an exception.
    """
    request = StageRequest(name, commit, params, lock, force, parent, parent_run)
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    try:
        with clone_lock(root, say) as held:
            reply = _answer(root, request, held)
    except WorkerRefused as problem:
        reply = StageReply("refused", f"{name}: {problem}")
    except data_remote.RemoteFailed as problem:
        reply = StageReply("failed", f"{name}: {problem}")
    return replace(reply, seconds=time.monotonic() - started)


def _answer(root: Path, request: StageRequest, held: int) -> StageReply:
    name = request.name
    _refuse_other_code(root, request.commit)
    _place(root, request)
    graph = versioning.stage_graph(root)
    if name not in graph:
        raise WorkerRefused(f"no such stage in dvc.yaml; stages: {', '.join(graph)}")
    data_remote.pull(root, stage_inputs(root, name))
    _adopt_parent(root, request)
    runner = StageRunner(
        root,
        graph,
        parent_record=request.parent,
        stale={name: "asked for"},
        force=request.force,
        held=(held,),
    )
    with stopping_on_signals(runner):
        outcome, uploader = _run(root, runner, request)
    reply = _push(root, request, outcome)
    if uploader is not None:
        uploader.drain()
    return replace(reply, files=_recorded_files(root, request, with_curves=uploader is None))


def _run(
    root: Path, runner: StageRunner, request: StageRequest
) -> tuple[StageOutcome, UploaderProcess | None]:
    uploads = request.parent_run is not None and TRACKING_URI in os.environ
    uploader = UploaderProcess(root) if uploads else None
    return runner.run(request.name), uploader


def _push(root: Path, request: StageRequest, outcome: StageOutcome) -> StageReply:
    """Check what the stage read, send what it made."""
    if not outcome.ok:
        status: ReplyStatus = "refused" if outcome.status == "refused" else "failed"
        return StageReply(status, outcome.message)
    entry = versioning.lock_entry(root, request.name)
    if entry is None:
        return StageReply("failed", f"{request.name}: DVC wrote no entry to dvc.lock")
    if foreign := foreign_inputs(entry, request.lock):
        return StageReply(
            "failed",
            f"{request.name}: ran on another version of {', '.join(foreign)} than the pipeline's; "
            f"nothing was sent (clone {root})",
        )
    try:
        data_remote.push(root, [out["path"] for out in entry["outs"]])
    except data_remote.RemoteFailed as problem:
        return StageReply(
            "unpushed", f"{request.name}: done and kept in {root}, not sent yet: {problem}"
        )
    return StageReply("ran" if outcome.status == "ran" else "skipped", outcome.message, entry=entry)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise WorkerRefused(f"git {arguments[0]} in {root}: {done.stderr.strip()}")
    return done.stdout


def code_commit(root: Path) -> str:
    """The commit that a clone's code is, dvc.lock and params.yaml aside (those travel).

    Raises:
        WorkerRefused: not a git clone, or changes that no commit has.
    """
    changes = _git(root, "status", "--porcelain", "--", ":!dvc.lock", ":!params.yaml")
    if changes:
        files = [line[3:] for line in changes.splitlines()]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise WorkerRefused(
            f"{root} has changes that no commit has ({files[0]}{more}): commit them and bring "
            "every clone to that commit, or undo them"
        )
    return _git(root, "rev-parse", "HEAD").strip()


def _refuse_other_code(root: Path, commit: str) -> None:
    here = code_commit(root)
    if here != commit:
        raise WorkerRefused(
            f"{root} is at commit {here[:12]}, the pipeline at {commit[:12]}: "
            f"`git fetch && git checkout {commit[:12]}` there"
        )


def _place(root: Path, request: StageRequest) -> None:
    """Make params.yaml and dvc.lock those of the request."""
    path, note = root / "params.yaml", root / PARAMS_PLACED
    now = path.read_bytes()
    wanted = request.params.encode()
    if now != wanted:
        ours = note.is_file() and note.read_text() == hashlib.sha256(now).hexdigest()
        if not ours and _git(root, "status", "--porcelain", "--", "params.yaml"):
            raise WorkerRefused(
                f"{path} was edited by hand and would be overwritten: "
                "`git checkout params.yaml` there"
            )
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(hashlib.sha256(wanted).hexdigest())
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(wanted)
        temporary.replace(path)
    merge_entries(root, request.lock)


def stage_inputs(root: Path, name: str) -> list[str]:
    """What `dvc pull` must bring for a stage: its dependencies as far as DVC has them.

    Originals are found by content and are no dependencies: a stage that reads them also gets the
    image store, where the clone has one.

    Raises:
        WorkerRefused: a dependency is neither in this clone nor known to DVC.
    """
    with versioning.open_repo(root) as repo:
        loaded = repo.stage.load_one(path=str(root / "dvc.yaml"), name=name)
        paths = [str(dep.def_path) for dep in loaded.deps if not getattr(dep, "params", None)]
    wanted = data_remote.tracked(root, paths)
    absent = [path for path in paths if path not in wanted and not (root / path).exists()]
    if absent:
        raise WorkerRefused(
            f"{absent[0]} is not in {root}: it is neither in git nor under DVC; "
            f"`dvc add {absent[0]}`, commit {absent[0]}.dvc, `dvc push`"
        )
    if IMAGE_STORE_READER in paths and (root / f"{IMAGE_STORE}.dvc").is_file():
        wanted.append(IMAGE_STORE)
    return wanted


def _adopt_parent(root: Path, request: StageRequest) -> None:
    """Let this clone's uploader hang the stage's run under the pipeline's."""
    if request.parent_run is None or not request.parent:
        return
    folder = records_dir(root) / request.parent
    if read_json(folder / "mlflow.json") is None:
        write_json(folder / "mlflow.json", {"run_id": request.parent_run})


def _recorded_files(root: Path, request: StageRequest, *, with_curves: bool) -> dict[str, str]:
    """The stage's record in this clone; curves and pictures too, where no server has them."""
    mine = [
        record
        for folder in records_dir(root).glob(f"{request.name}-*")
        if (record := Record(folder)).run.parent == request.parent
    ]
    if not mine:
        return {}
    record = max(mine, key=lambda one: one.run.started_ms)
    paths = [path for path in record.folder.iterdir() if path.is_file()]
    if with_curves:
        run, result = record.run, record.result
        named = [run.metrics_file, run.images_dir, *(result.artifacts if result else [])]
        for path in (root / name for name in named if name and name.startswith("runs/")):
            paths += [path] if path.is_file() else sorted(path.glob("*.png"))
    return {
        str(path.relative_to(root)): base64.b64encode(path.read_bytes()).decode("ascii")
        for path in paths
    }


def keep_files(root: Path, files: Mapping[str, str]) -> None:
    """Write a reply's files into the pipeline's clone.

    Raises:
        ValueError: a path that leads out of `runs/`.
    """
    # The result last: the uploader takes a record with a result for complete.
    for name in sorted(files, key=lambda name: name.endswith("/result.json")):
        path = PurePosixPath(name)
        if path.parts[0] != "runs" or ".." in path.parts or path.name.startswith("."):
            raise ValueError(f"a worker's reply names {name}, which is not below runs/")
        target = root / path
        if path.name == "mlflow.json" and target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(base64.b64decode(files[name]))
        temporary.replace(target)


def as_json(message: StageRequest | StageReply) -> dict[str, Any]:
    """A request or reply as JSON values."""
    return asdict(message)


def read_reply(values: Mapping[str, Any]) -> StageReply:
    """A reply from its JSON.

    Raises:
        WorkerRefused: another protocol.
    """
    if values.get("protocol") != PROTOCOL:
        raise WorkerRefused(f"the worker answered in protocol {values.get('protocol')}")
    return StageReply(**values)
