"""One stage in this process, recorded: settings, GPUs, the stage module, a clear line on failure.

This is what `ultraflux stage run NAME` does, and therefore what DVC does for every engine.
Exit codes: 0 done; 2 bad input, settings or data (a retry cannot help); 1 anything else;
130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from components.files.cut_bytecode import describe_cut_bytecode, remove_cut_bytecode
from components.files.weight_folders import file_digest
from components.settings.bad_input import cured_by_no_retry
from components.settings.schema import Settings, load_settings
from components.telemetry.metric_log import MetricLog
from components.telemetry.wording import legible_lines
from components.training.distributed.run_states import RunState, StateRefused, mark_finished
from flows import environment
from flows.records.costs import with_cost
from flows.records.owners import own_record
from flows.records.records import Record, RunDescription, RunResult, open_record, write_json
from flows.records.system_metrics import watched
from flows.running.gpu_lock import gpus_for
from flows.running.guarded_process import end_with_launcher
from flows.running.training_state import Wish, identity_of, open_state, segment_tags
from flows.stages.contract import StageContext, StageFailed, StageResult, state_folder
from flows.tracking.uploader_process import NOT_SENT, UploaderProcess
from flows.versioning import graph as versioning
from flows.versioning.clone import Clone
from flows.versioning.code_files import CODE, CodeChanges, code_path
from flows.versioning.lock_hashes import out_hashes
from flows.versioning.parameters import stage_parameters
from flows.versioning.source_listing import SOURCE, TABLE, source_changes

OUTCOME_FILE = "ULTRAFLUX_OUTCOME_FILE"
"""Names a file in which whoever asked for the stage wants to read how it ended."""
PARENT_RECORD = "ULTRAFLUX_PARENT_RECORD"
"""Record id of the pipeline that runs this stage; without it the stage uploads its own record."""
PREFECT_RUN = "ULTRAFLUX_PREFECT_FLOW_RUN"
FORCED = "ULTRAFLUX_FORCED"
"""Set where a stage is to run even when nothing has changed."""

EXIT_BAD_INPUT, EXIT_ERROR, EXIT_INTERRUPTED = 2, 1, 130


def _undeclared_outputs(root: Path, node: versioning.StageNode) -> list[str]:
    """Files in data/<stage>/ that no output in dvc.yaml covers; DVC would lose them.

    Folders that dvc.yaml declares are not looked into: there may be millions of files in them.
    """
    declared = {root / path for path in (*node.outputs, *node.meta.unversioned)}
    stray: list[str] = []
    for current, folders, files in os.walk(root / "data" / node.name):
        here = Path(current)
        if here in declared:
            folders.clear()
            continue
        names = [name for name in files if name != ".gitignore" and here / name not in declared]
        stray += [str((here / name).relative_to(root)) for name in names]
    return sorted(stray)


def _describe(
    root: Path,
    node: versioning.StageNode,
    key: str,
    inputs: dict[str, str],
    state_dir: Path,
) -> RunDescription:
    from flows.records.provenance import provenance_tags

    parent = os.environ.get(PARENT_RECORD)
    tags = provenance_tags(root) | {
        "ultraflux.stage": node.name,
        "ultraflux.stage_key": key,
        "ultraflux.command": node.command,
    }
    if PREFECT_RUN in os.environ:
        tags["prefect.flow_run_id"] = os.environ[PREFECT_RUN]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        # `dvc exp run` tells its stages.
        tags["dvc.experiment"] = experiment
    return RunDescription(
        kind="stage",
        name=node.name,
        stage_key=key,
        parent=parent,
        metrics_file=str((state_dir / "metrics.jsonl").relative_to(root)),
        system_file=str((state_dir / "system.jsonl").relative_to(root)),
        images_dir=str((state_dir / "samples").relative_to(root)),
        params=stage_parameters(root, node.name),
        tags=tags,
        inputs=inputs,
    )


def _as_result(root: Path, result: StageResult) -> RunResult:
    def relative(path: Path) -> str:
        return str(path.resolve().relative_to(root))

    return RunResult(
        status="FINISHED",
        metrics={name: float(value) for name, value in result.metrics.items()},
        artifacts=[relative(path) for path in result.artifacts],
        datasets={name: relative(path) for name, path in result.datasets.items()},
        tags=result.tags,
        promotions=[dict(promotion) for promotion in result.promotions],
        summary=result.summary,
    )


def _report_outcome(status: str, message: str, record: Record | None, seconds: float) -> None:
    target = os.environ.get(OUTCOME_FILE)
    if target:
        record_id = record.record_id if record else None
        outcome = {"status": status, "message": message, "record": record_id, "seconds": seconds}
        write_json(Path(target), outcome)


def _refuse_other_code(root: Path, name: str) -> None:
    """Refuse to make results under the fingerprint of code that is not the one that would run.

    Raises:
        StageFailed: the stage's file below data/code is missing or of other code.
    """
    if code_path(name) not in versioning.dependencies(root, name):
        return
    makes = f"`dvc repro {CODE}` (or `ultraflux run --until {name}`) brings it in line"
    try:
        differs = CodeChanges(root).other_than_written(name)
    except FileNotFoundError:
        raise StageFailed(f"{name}: {code_path(name)} is missing; {makes}") from None
    if differs:
        raise StageFailed(f"{name}: {code_path(name)} is not of this code ({differs}); {makes}")


def _has_nothing_to_do(root: Path, name: str) -> bool:
    """Whether DVC runs a stage only because it always does; such a run would be no record's worth.

    Its table is there and is the one that dvc.lock names: DVC keeps it (`persist`).
    """
    # Only that stage is "always changed" to DVC: it alone looks at files which DVC does not track.
    if name != SOURCE or FORCED in os.environ:
        return False
    entry = versioning.lock_entry(root, name)
    if entry is None or not (root / TABLE).is_file():
        return False
    if source_changes(root, entry):
        return False
    return file_digest(root / TABLE, "md5") == out_hashes(entry).get(TABLE)


def _training_state(
    clone: Clone, node: versioning.StageNode, settings: Settings, inputs: dict[str, str]
) -> RunState | None:
    """The training state that a stage works on; None: it trains nothing.

    Raises:
        StageFailed: an unfinished run of another past is there, and nobody said what to do.
    """
    if not node.meta.trains:
        return None
    identity = identity_of(clone.root, node.name, settings, inputs)
    runtime = settings.runtime
    try:
        processes = runtime.processes * runtime.nodes
        return open_state(clone.root, identity, Wish.of(settings), processes)
    except StateRefused as problem:
        raise StageFailed(str(problem)) from None


def _run(context: StageContext, node: versioning.StageNode) -> RunResult:
    module = importlib.import_module(f"flows.stages.{node.name}")
    result = module.run(context)
    stray = _undeclared_outputs(context.root, node)
    if stray:
        raise StageFailed(
            f"{node.name}: wrote {', '.join(stray[:3])}, which dvc.yaml does not declare: add it "
            "to `outs` of the stage, or a folder that DVC is not to version to `meta.unversioned`"
        )
    result = replace(result, tags=result.tags | segment_tags(context.segments))
    return _as_result(context.root, with_doubts(result, node.name, context.settings))


def with_doubts(result: StageResult, stage: str, settings: Settings) -> StageResult:
    """With what the stage's settings could not reach in its line."""
    doubts = [f"warning: {doubt}" for name, doubt in settings.doubts() if name == stage]
    return replace(result, summary="; ".join([result.summary, *doubts]))


def run_stage(name: str, root: Path) -> int:
    """Run stage `name` of the project at `root`; returns the exit code (see module docstring)."""
    started = time.monotonic()
    record: Record | None = None
    uploader = None
    end_with_launcher()
    try:
        settings = load_settings(root / "params.yaml")
        _prepare(settings, root)
        clone = Clone(root)
        # Everything that is asked of DVC is asked here at once, since opening the repository is
        # slow; none of it stays open while the stage works.
        with clone.opened():
            node = clone.stage(name)
            _refuse_other_code(root, name)
            if _has_nothing_to_do(root, name):
                print(f"{name}: unchanged", file=sys.stderr)
                return 0
            key, inputs = clone.identity(name)
            state = _training_state(clone, node, settings, inputs)
        state_dir = state_folder(root, name, key) if state is None else state.folder
        state_dir.mkdir(parents=True, exist_ok=True)
        record = open_record(root, _describe(root, node, key, inputs, state_dir))
        own_record(root, record.record_id)
        # A pipeline uploads for its stages, with one process that has MLflow imported.
        if PARENT_RECORD not in os.environ:
            uploader = UploaderProcess(root)
        metrics = MetricLog(state_dir / "metrics.jsonl")
        segments = () if state is None else state.segments
        context = StageContext(name, settings, root, state_dir, metrics, segments=segments)
        runtime = settings.runtime
        with (
            gpus_for(
                name,
                node.meta.gpus,
                free_fraction=runtime.gpu_free_fraction,
                wait_s=60 * runtime.gpu_wait_minutes,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            ),
            watched(state_dir / "system.jsonl", root),
        ):
            # After the wait for devices, which costs nobody a GPU-hour.
            begun = time.monotonic()
            result = with_cost(
                _run(context, node), time.monotonic() - begun, node.meta.gpus, runtime
            )
        if state is not None:
            mark_finished(state.folder)
    except KeyboardInterrupt as stop:
        # A training run says at which step it has saved.
        message = str(stop) or f"{name}: interrupted; run it again to continue"
        code = EXIT_INTERRUPTED
        result = RunResult(status="KILLED", error=message)
    except Exception as problem:
        bad_input = cured_by_no_retry(problem)
        code = EXIT_BAD_INPUT if bad_input else EXIT_ERROR
        text = str(problem) or type(problem).__name__
        message = text if text.startswith(f"{name}:") else f"{name}: {text}"
        if not bad_input:
            message = f"{name}: {type(problem).__name__}: {text}"
        if (cut := remove_cut_bytecode(problem)) is not None:
            message = f"{name}: {describe_cut_bytecode(cut)}"
        found = problem.found if isinstance(problem, StageFailed) else StageResult()
        result = replace(
            _as_result(root, found), status="FAILED", error=traceback.format_exc(), summary=""
        )
        if record is not None:
            (record.folder / "error.txt").write_text(result.error, encoding="utf-8")
            if not bad_input:
                message += f" (traceback: {(record.folder / 'error.txt').relative_to(root)})"
    else:
        message, code = result.summary, 0
    if record is not None:
        record.finish(result)
    status = {0: "finished", EXIT_BAD_INPUT: "refused"}.get(code, "failed")
    # Before the upload, which may wait for a server: whoever asked for the stage is told at once.
    _report_outcome(status, message, record, time.monotonic() - started)
    said = f"{name}: {message}" if code == 0 else f"error: {message}"
    print(legible_lines(said), file=sys.stderr)
    if uploader is not None and not uploader.drain():
        print(NOT_SENT, file=sys.stderr)
    return code


def _prepare(settings: Settings, root: Path) -> None:
    environment.prepare(
        offline=settings.runtime.offline,
        torch_threads=settings.runtime.torch_threads,
        root=root.resolve(),
    )
