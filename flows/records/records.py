"""Run records: what a stage or pipeline says of itself, on disk, before any server hears of it.

A record is a folder under `runs/records/`. Stages write it, `tracking.uploader` uploads it to
MLflow: so a tracking server that is slow or down costs a training step nothing, and nothing is
lost.

    run.json      who, with which key, parameters and tags (written at the start)
    result.json   how it ended, headline metrics, files to log (written at the end)
    owner.json    which process it belongs to (flows.records.owners)
    outputs.json  DVC hashes of the outputs (written after `dvc repro` by whoever ran it)
    mlflow.json   how far the upload is (written by the uploader alone)
"""

from __future__ import annotations

import functools
import json
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from components.files.whole_files import write_text
from components.settings.field_errors import first_error

RECORD_VERSION = 1
RUN_TAGS = "ULTRAFLUX_RUN_TAGS"
"""Environment variable: tags (JSON) that a pipeline run gets besides its own."""
ACCEPTED_TAG = "ultraflux.accepted"
"""Tag of a run whose results a person has let stand for later code: a line for each time."""
MAKER_TAG = "ultraflux.accepts.record"
"""Tag of an acceptance: the record of the run that made the results."""
Status = Literal["FINISHED", "FAILED", "KILLED"]
_Kind = TypeVar("_Kind")
_said_torn: set[Path] = set()


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write JSON beside `path` and rename, so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_text(path, text, durable=durable, contended=True)


def read_json(path: Path) -> Any:
    """The value in `path`; None when there is no such file, or none that a power cut left whole.

    The latter is said once: what a process notes as it works, a lost note makes it do again.
    """
    try:
        return read_whole_json(path)
    except TornJson as problem:
        _say_missing(path, problem)
        return None


def read_fields(cls: type[_Kind], path: Path) -> _Kind | None:
    """As `read_json`, of a file that holds a dataclass."""
    try:
        values = read_whole_json(path)
        return None if values is None else from_json(cls, values, path)
    except TornJson as problem:
        _say_missing(path, problem)
        return None


def read_list(cls: type[_Kind], path: Path) -> list[_Kind]:
    """As `read_fields`, of a list of them: what has another shape is said, the others count."""
    found = []
    for values in read_fields(list, path) or []:
        try:
            found.append(from_json(cls, values, path))
        except TornJson as problem:
            _say_missing(path, problem)
    return found


def _say_missing(path: Path, problem: TornJson) -> None:
    if path not in _said_torn:
        _said_torn.add(path)
        print(f"{problem}: it counts as missing", file=sys.stderr, flush=True)


class TornJson(ValueError):
    """A file that was to hold JSON; one line that names it."""


def read_whole_json(path: Path) -> Any:
    """As `read_json`, of what nothing can stand in for.

    Raises:
        TornJson: the file is there, but not whole.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (IsADirectoryError, RecursionError, ValueError) as problem:
        raise TornJson(f"{path} is not JSON ({problem})") from None


@functools.cache
def _reader(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def from_json(cls: type[_Kind], values: Any, path: Path) -> _Kind:
    """A dataclass of what a file held; fields that a newer version of the code wrote are left.

    Raises:
        TornJson: no object of these fields; one line.
    """
    from pydantic import ValidationError

    try:
        return cast(_Kind, _reader(cast(Any, cls)).validate_python(values))
    except ValidationError as problem:
        raise TornJson(f"{path}: {first_error(problem, verbatim=True)}") from None


@dataclass(frozen=True)
class RunDescription:
    """Content of run.json."""

    kind: Literal["stage", "pipeline", "sweep", "acceptance"]
    name: str
    stage_key: str | None = None
    parent: str | None = None
    """Record id of the pipeline."""
    metrics_file: str | None = None
    """JSONL of metrics over steps, relative to the repository root."""
    system_file: str | None = None
    """JSONL of the machine's load, relative to the repository root."""
    images_dir: str | None = None
    """Folder of `step-<number>.png` pictures, relative to the repository root."""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """DVC hash by path of what a stage reads, code included."""
    started_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    attempts: int = 1
    """Starts under the same key: an interrupted run that was resumed has more than one."""
    version: int = RECORD_VERSION


@dataclass(frozen=True)
class RunResult:
    """Content of result.json."""

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    datasets: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    promotions: list[dict[str, Any]] = field(default_factory=list)
    """Fields of `flows.tracking.registry.Promotion`."""
    summary: str = ""
    error: str = ""
    ended_ms: int = field(default_factory=lambda: int(time.time() * 1000))


@dataclass(frozen=True)
class Record:
    """One record folder."""

    folder: Path

    @property
    def record_id(self) -> str:
        """Folder name."""
        return self.folder.name

    @property
    def run(self) -> RunDescription:
        """run.json.

        Raises:
            TornJson: another kind of file; `all_records` has none of these.
        """
        path = self.folder / "run.json"
        return from_json(RunDescription, read_whole_json(path), path)

    @property
    def result(self) -> RunResult | None:
        """result.json, None while the run goes on (or was killed)."""
        return read_fields(RunResult, self.folder / "result.json")

    @property
    def outputs(self) -> dict[str, str]:
        """DVC hash by output path."""
        return read_json(self.folder / "outputs.json") or {}

    @property
    def mlflow_run_id(self) -> str | None:
        """Run id in MLflow once the uploader has created it."""
        return (read_json(self.folder / "mlflow.json") or {}).get("run_id")

    @property
    def experiment_id(self) -> str | None:
        """Experiment of that run; None before it is uploaded."""
        store = (read_json(self.folder / "mlflow.json") or {}).get("store", "")
        return store.partition("@")[0] or None

    def finish(self, result: RunResult) -> None:
        """Write result.json."""
        write_json(self.folder / "result.json", asdict(result), durable=True)

    def set_outputs(self, hashes: Mapping[str, str]) -> None:
        """Write outputs.json."""
        write_json(self.folder / "outputs.json", dict(hashes), durable=True)


def records_dir(root: Path) -> Path:
    """`runs/records`."""
    return root / "runs" / "records"


def all_records(root: Path) -> Iterator[Record]:
    """Records in the order of their start."""
    # Not by the folder: a record is one from the moment that its run.json is there, whole.
    folders = [path.parent for path in records_dir(root).glob("*/run.json")]
    found = [
        (run.started_ms, path.name, path)
        for path in folders
        if (run := read_fields(RunDescription, path / "run.json"))
    ]
    yield from (Record(path) for _, _, path in sorted(found))


def unsent_records(root: Path) -> set[str]:
    """Ids of ended records that have not reached MLflow completely."""
    unsent = set()
    for record in all_records(root):
        result = record.result
        state = read_json(record.folder / "mlflow.json") or {}
        if result is not None and state.get("ended_ms") != result.ended_ms:
            unsent.add(record.record_id)
    return unsent


def open_record(root: Path, run: RunDescription) -> Record:
    """The unfinished record of the same stage and key, brought up to date, or a new one."""
    if run.stage_key is not None:
        for record in all_records(root):
            known = record.run
            if known.name == run.name and known.stage_key == run.stage_key:
                result = record.result
                # Equal inputs and not finished: its curves go on in the run that has them already.
                if result is None or result.status != "FINISHED":
                    (record.folder / "result.json").unlink(missing_ok=True)
                    values = asdict(run) | {
                        "started_ms": known.started_ms,
                        "attempts": known.attempts + 1,
                    }
                    write_json(record.folder / "run.json", values, durable=True)
                    return record
    record = Record(records_dir(root) / f"{run.name}-{uuid.uuid4().hex[:12]}")
    write_json(record.folder / "run.json", asdict(run), durable=True)
    return record


def maker_of(root: Path, name: str, outputs: Mapping[str, str]) -> Record | None:
    """The newest run of a stage that made these outputs (DVC hash by path).

    By name too: an acceptance carries the hashes of the outputs that it lets stand.
    """
    made = [r for r in all_records(root) if outputs and r.run.name == name and r.outputs == outputs]
    return made[-1] if made else None


def latest_finished(root: Path, name: str) -> Record | None:
    """The newest finished record of a stage: the run that a skipped stage links to."""
    newest = None
    for record in all_records(root):
        result = record.result
        if record.run.name == name and result is not None and result.status == "FINISHED":
            newest = record
    return newest


def close_interrupted(root: Path, parent: str) -> None:
    """Mark records of a pipeline that never ended (their process is gone) as killed."""
    for record in all_records(root):
        if record.run.parent == parent and record.result is None:
            record.finish(RunResult(status="KILLED", error="the process ended without a result"))
