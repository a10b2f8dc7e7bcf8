"""One stage in a clone on another machine: pull its inputs, run it, push its outputs.

The answer is the stage's entry of dvc.lock with what its run recorded; the pipeline that asked
merges both (`flows.remote.remote_requests`). Requests and replies are JSON, so any executor can
carry them: `ultraflux stage remote`, the Prefect deployments (`flows.pipeline.deployed`), ssh. DVC
alone would not do: `repro --pull` and `--allow-missing` on a machine without the dependencies
silently keep old results.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from components.files.whole_files import write_bytes
from components.settings.schema import load_settings
from components.telemetry.wording import few
from flows.records.programs import ProgramFailed, git
from flows.records.records import Record, read_json, records_dir, write_json
from flows.remote import data_remote
from flows.remote.lock_entries import foreign_inputs, merge_entries
from flows.remote.stage_messages import ReplyStatus, StageReply, StageRequest, WorkerRefused
from flows.remote.state_copies import StateCopies, copies_wanted
from flows.running.clone_lock import CloneBusy, clone_lock
from flows.running.dvc_repro import DvcRunner
from flows.running.stage_runner import StageOutcome, stopping_on_signals
from flows.tracking.uploader_process import UploaderProcess
from flows.versioning import graph as versioning
from flows.versioning.code_files import CODE, code_path, reaches, write_code_files
from flows.versioning.source_listing import reads_source

PARAMS_PLACED = "runs/remote/params.sha256"
TRACKING_URI = "MLFLOW_TRACKING_URI"
IMAGE_STORE = "data/images"
IMAGE_STORE_READER = "components.images.original_lookup"


def opened_here(root: Path, parent: str) -> bool:
    """Whether the clone at `root` is the one whose pipeline has the record id `parent`.

    A pipeline describes itself in its own clone alone; a path would not tell two machines apart.
    """
    return bool(parent) and (records_dir(root) / parent / "run.json").is_file()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def run_remote_stage(
    request: StageRequest,
    *,
    root: Path,
    say: Callable[[str], None] = _to_stderr,
    own_signals: bool = True,
) -> StageReply:
    """Run a stage in the clone at `root` for a pipeline elsewhere.

    Args:
        request: what is asked; its `lock` is from `flows.remote.lock_entries.needed_entries`.
        root: the worker's clone; one stage at a time works in it, a second waits. The pipeline's
            own clone is held by the pipeline, so there stages run side by side as it sends them.
        say: told in lines what it waits for, or where a lost clone's training goes on.
        own_signals: let Ctrl-C and SIGTERM stop the stage; not where a framework handles them.

    Returns:
        The reply; a stage that fails is a reply, not an exception.
    """
    name = request.name
    started = time.monotonic()
    own = opened_here(root, request.parent)
    lock = nullcontext() if own else clone_lock(root, say, patience_s=request.patience_s)
    try:
        with lock as held:
            reply = _answer(root, request, held, say, own_signals)
    except CloneBusy as problem:
        reply = StageReply("busy", f"{name}: {problem}")
    except WorkerRefused as problem:
        reply = StageReply("refused", f"{name}: {problem}")
    except data_remote.RemoteFailed as problem:
        reply = StageReply("failed", f"{name}: {problem}")
    return replace(reply, seconds=time.monotonic() - started)


def _answer(
    root: Path,
    request: StageRequest,
    held: int | None,
    say: Callable[[str], None],
    own_signals: bool,
) -> StageReply:
    """Answer in a clone whose lock is `held`; None: in the pipeline's own."""
    name = request.name
    _refuse_other_code(root, request.commit)
    if held is not None:
        _place(root, request)
    graph = versioning.stage_graph(root)
    if name not in graph:
        raise WorkerRefused(f"no such stage in dvc.yaml; stages: {', '.join(graph)}")
    if CODE in graph and name != CODE:
        # The request's commit is this clone's, so its code files are made here and not sent.
        write_code_files(root)
    data_remote.pull(root, stage_inputs(root, name))
    if held is not None:
        _adopt_parent(root, request)
    runner = DvcRunner(
        root,
        graph,
        parent_record=request.parent,
        stale={name: "asked for"},
        force=request.force,
        held=() if held is None else (held,),
    )
    # After the pull: the key of the state is made of the inputs.
    copies = StateCopies(root, name) if graph[name].meta.resumable and copies_wanted() else None
    with stopping_on_signals(runner) if own_signals else nullcontext():
        checkpoint = copies.restore() if copies is not None else None
        if checkpoint is not None:
            say(f"{name}: goes on from {checkpoint} of a clone that did not finish")
        with nullcontext() if copies is None else copies.kept_up(say):
            outcome, uploader = _run(root, runner, request, uploads=held is not None)
    reply = _push(root, request, outcome)
    if checkpoint is not None:
        reply = replace(reply, message=f"{reply.message} (from {checkpoint} of another clone)")
    if copies is not None and reply.entry is not None:
        try:
            copies.drop()
        except data_remote.RemoteFailed as problem:
            say(f"{name}: done, its copies of state stay on the remote: {problem}")
    if held is None:
        # Record and curves are where the pipeline's uploader looks for them.
        return reply
    if uploader is not None:
        uploader.drain()
    return replace(reply, files=_recorded_files(root, request, with_curves=uploader is None))


def _run(
    root: Path, runner: DvcRunner, request: StageRequest, *, uploads: bool
) -> tuple[StageOutcome, UploaderProcess | None]:
    uploads = uploads and request.parent_run is not None and TRACKING_URI in os.environ
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
    try:
        return git(root, *arguments)
    except ProgramFailed as problem:
        raise WorkerRefused(f"{root}: {problem}") from None


def code_commit(root: Path) -> str:
    """The commit that a clone's code is, dvc.lock and params.yaml aside (those travel).

    Raises:
        WorkerRefused: not a git clone, or changes that no commit has.
    """
    changes = _git(root, "status", "--porcelain", "--", ":!dvc.lock", ":!params.yaml")
    if changes:
        files = [line[3:] for line in changes.splitlines()]
        raise WorkerRefused(
            f"{root} has changes that no commit has ({few(files, 1)}): commit them and bring "
            "every clone to that commit, or undo them"
        )
    return _git(root, "rev-parse", "HEAD")


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
        # What an earlier request has placed may be replaced; what a person has edited may not.
        ours = note.is_file() and note.read_text() == hashlib.sha256(now).hexdigest()
        if not ours and _git(root, "status", "--porcelain", "--", "params.yaml"):
            raise WorkerRefused(
                f"{path} was edited by hand and would be overwritten: "
                "`git checkout params.yaml` there"
            )
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(hashlib.sha256(wanted).hexdigest())
        write_bytes(path, wanted, contended=True)
    merge_entries(root, request.lock)


def stage_inputs(root: Path, name: str) -> list[str]:
    """What `dvc pull` must bring for a stage: its dependencies as far as DVC has them.

    Originals are found by content and are no dependencies: a stage that reads them also gets the
    image store, where the clone has one.

    Raises:
        WorkerRefused: a dependency is neither in this clone nor known to DVC.
    """
    with versioning.open_repo(root) as repo:
        loaded = versioning.load_stage(repo, root, name)
        paths = [str(dep.def_path) for dep in loaded.deps if not getattr(dep, "params", None)]
        # Made of this clone's own code, which is the pipeline's.
        paths = [path for path in paths if path != code_path(name)]
        if reads_source(name, paths):
            paths.append(load_settings(root / "params.yaml").ingest.source)
        wanted = data_remote.tracked(root, paths)
    absent = [path for path in paths if path not in wanted and not (root / path).exists()]
    if absent:
        raise WorkerRefused(
            f"{absent[0]} is not in {root}: it is neither in git nor under DVC; "
            f"`dvc add {absent[0]}`, commit {absent[0]}.dvc, `dvc push`"
        )
    if (root / f"{IMAGE_STORE}.dvc").is_file() and reaches(root, name, IMAGE_STORE_READER):
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
