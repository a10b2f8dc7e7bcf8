"""What is known of finished stage runs: records of this clone, dvc.lock, and MLflow where it is up.

Runs are joined by content: a run's input and the run that made it carry the same DVC hash, weights
the same sha256. So a walk needs no server, and survives restored, skipped and repeated stages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.weight_folders import file_digest
from components.generation.generation_list import read_generations
from flows.history.acceptance import accepted_lines
from flows.records.records import ACCEPTED_TAG, Record, all_records
from flows.records.trees import record_trees
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import cached_file, dep_hashes, out_hashes
from flows.versioning.parameters import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_IN, _OUT = "dvc.in.", "dvc.out."
_MAX_RUNS = 5000


@dataclass(frozen=True)
class StageRun:
    """One finished run of a stage, wherever it was recorded."""

    stage: str
    source: str
    """record, mlflow or dvc.lock."""
    record_id: str = ""
    run_id: str = ""
    """In MLflow."""
    parent: str = ""
    """Record id of the pipeline run."""
    started_ms: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    """DVC hash by path."""
    outputs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    """From start to end; None where unknown, or where it was interrupted in between."""

    @property
    def name(self) -> str:
        """What a person can ask for again."""
        return self.record_id or self.run_id or f"{self.stage} (dvc.lock)"

    def weights(self) -> dict[str, str]:
        """sha256 of the weights that this run made, by tag without its prefix."""
        prefix = "weights."
        return {k.removeprefix(prefix): v for k, v in self.tags.items() if k.startswith(prefix)}


def _from_record(record: Record, lock: Mapping[str, Any]) -> StageRun | None:
    run, result = record.run, record.result
    if run.kind != "stage" or result is None or result.status != "FINISHED":
        return None
    entry = lock.get(run.name, {})
    inputs, outputs = run.inputs, record.outputs
    locked_in = dep_hashes(entry)
    locked_out = out_hashes(entry)
    if not outputs and inputs and inputs == locked_in and _same_params(run.params, entry):
        # `dvc repro` by hand: nobody wrote the hashes down, but the lock is of this run.
        outputs = locked_out
    if not inputs and outputs and outputs == locked_out:
        inputs = locked_in
    return StageRun(
        stage=run.name,
        source="record",
        record_id=record.record_id,
        run_id=record.mlflow_run_id or "",
        parent=run.parent or "",
        started_ms=run.started_ms,
        inputs=inputs,
        outputs=outputs,
        tags=run.tags | result.tags,
        metrics=result.metrics,
        params=run.params,
        # Between two attempts lies a night, or a week.
        seconds=(result.ended_ms - run.started_ms) / 1000 if run.attempts == 1 else None,
    )


def _same_params(params: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    values = entry.get("params", {}).get("params.yaml", {})
    return dict(flatten(values)) == dict(params)


def from_mlflow(run: Run) -> StageRun:
    """A run as the tracking server tells it; parameters are texts."""
    tags = dict(run.data.tags)
    started, ended = run.info.start_time, run.info.end_time
    whole = started and ended and "ultraflux.attempts" not in tags
    return StageRun(
        stage=tags.get("ultraflux.stage", run.info.run_name or ""),
        source="mlflow",
        record_id=tags.get("ultraflux.record", ""),
        run_id=run.info.run_id,
        started_ms=int(run.info.start_time or 0),
        inputs={k.removeprefix(_IN): v for k, v in tags.items() if k.startswith(_IN)},
        outputs={k.removeprefix(_OUT): v for k, v in tags.items() if k.startswith(_OUT)},
        tags=tags,
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        seconds=(ended - started) / 1000 if whole else None,
    )


def finished_runs(
    root: Path, lock: Mapping[str, Any], client: MlflowClient | None
) -> list[StageRun]:
    """What records of the clone and MLflow know; a run that both know counts once.

    Args:
        root: the clone.
        lock: `stages` of dvc.lock.
        client: of a tracking store that answers, if there is one.
    """
    records = (record for tree in record_trees(root) for record in all_records(tree))
    known = (_from_record(record, lock) for record in records)
    runs = [run for run in known if run is not None]
    # By both: an upload that was repeated has another run id and the same record.
    ids = {run.run_id for run in runs} | {run.record_id for run in runs}
    for run in _tracked(client):
        if run.run_id not in ids and run.record_id not in ids:
            runs.append(run)
    return runs


def _tracked(client: MlflowClient | None) -> list[StageRun]:
    if client is None:
        return []
    experiments = [found.experiment_id for found in client.search_experiments()]
    found = client.search_runs(
        experiments,
        "tags.`ultraflux.kind` = 'stage' and attributes.status = 'FINISHED'",
        max_results=_MAX_RUNS,
    )
    return [from_mlflow(run) for run in found]


def connect(root: Path) -> tuple[MlflowClient | None, str]:
    """(client, "") of a tracking store that answers now, or (None, why not); creates nothing."""
    from flows.tracking.tier import sqlite_file
    from flows.tracking.uploader import tracking_uri, use_store

    uri = tracking_uri(root)
    if uri.startswith("sqlite:") and not sqlite_file(uri).is_file():
        return None, "nothing was uploaded from this clone yet (`ultraflux sync`)"
    # A question, not a record: better no answer than minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    try:
        # Registered models of a SQLite store are resolved through the global address.
        use_store(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as problem:
        return None, " ".join(str(problem).split())[:200]
    return client, ""


class Evidence:
    """Runs and tables of one clone."""

    def __init__(self, root: Path, *, mlflow: bool = True) -> None:
        """Read records and lock; ask MLflow unless told not to."""
        self.root = root
        self.lock = versioning.read_lock(root)
        self.client, self.mlflow_problem = connect(root) if mlflow else (None, "not asked")
        self.runs = self._read_runs()

    def _read_runs(self) -> list[StageRun]:
        """Oldest first, with those that only dvc.lock tells of."""
        runs = finished_runs(self.root, self.lock, self.client)
        for stage, entry in self.lock.items():
            outputs = out_hashes(entry)
            # A result that was pulled from a remote has no record here; the lock is all that is
            # known.
            if outputs and not any(r.stage == stage and r.outputs == outputs for r in runs):
                inputs = dep_hashes(entry)
                found = StageRun(stage, "dvc.lock", inputs=inputs, outputs=outputs)
                runs.append(replace(found, tags=self._tags_of_files(found)))
        runs = [self._with_acceptance(run) for run in runs]
        return sorted(runs, key=lambda run: run.started_ms)

    def _with_acceptance(self, run: StageRun) -> StageRun:
        line = self._accepted.get((run.stage, tuple(sorted(run.outputs.items()))))
        return replace(run, tags=run.tags | {ACCEPTED_TAG: line}) if line else run

    @cached_property
    def _accepted(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], str]:
        return accepted_lines(self.root)

    def _tags_of_files(self, run: StageRun) -> dict[str, str]:
        """Digests that a stage would have recorded, from its files in the clone."""
        from components.files.weight_folders import folder_digest

        tags = {}
        names = {
            "vae": ("autoencoder",),
            "dit_stage1": ("raw", "ema"),
            "dit_stage2": ("raw", "ema"),
        }
        for name in names.get(run.stage, ()):
            folder = self.root / "data" / run.stage / name
            if folder.is_dir():
                tags[f"weights.{name}"] = folder_digest(folder)
        if run.stage == "generate":
            for line in self.generations(run)[:1]:
                tags |= {f"sha256.{part}": digest for part, digest in line["digests"].items()}
        return tags

    @cached_property
    def _cache(self) -> Path:
        return versioning.cache_folder(self.root)

    def file(self, path: str, md5: str) -> Path | None:
        """Where the bytes with this DVC hash are: cache, or clone (hashed); None: nowhere."""
        cached = cached_file(self._cache, md5)
        if cached.is_file():
            return cached
        here = self.root / path
        # A folder's hash is that of DVC's list of it, which the folder itself does not hold.
        if here.is_file() and not md5.endswith(".dir") and file_digest(here, "md5") == md5:
            return here
        return None

    def generations(self, run: StageRun) -> list[dict[str, Any]]:
        """Lines of the `generations.jsonl` that a run of `generate` wrote; empty if it is gone."""
        path = "data/generate/generations.jsonl"
        file = self.file(path, run.outputs[path]) if path in run.outputs else None
        return [] if file is None else read_generations(file)

    def producer(self, path: str, md5: str) -> StageRun | None:
        """The newest run that wrote these bytes to this path."""
        made = [run for run in self.runs if run.outputs.get(path) == md5]
        return made[-1] if made else None

    def consumers(self, path: str, md5: str) -> list[StageRun]:
        """Runs that read these bytes from this path."""
        return [run for run in self.runs if run.inputs.get(path) == md5]

    def makers_of_weights(self, digest: str) -> list[StageRun]:
        """Runs that made weights or text encoders with this sha256, newest last."""
        return [
            run
            for run in self.runs
            if digest in run.weights().values() or digest == run.tags.get("text_encoders.digest")
        ]
