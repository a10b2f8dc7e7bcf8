"""Upload run records to MLflow, in a process of its own, as often as the server allows.

`python -m flows.tracking.uploader ROOT` follows `runs/records/` until its standard input closes and
everything finished is uploaded. One uploader works at a time (a file lock); a second waits. Killed
or offline uploaders lose nothing and send nothing twice (see `flows.tracking.metric_feed`), and
`ultraflux sync` sends the rest later.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.settings.yaml_files import YamlRefused
from flows import environment
from flows.records.records import (
    ACCEPTED_TAG,
    MAKER_TAG,
    Record,
    RunResult,
    all_records,
    from_json,
    read_json,
    write_json,
)
from flows.tracking import metric_feed
from flows.tracking.artifact_places import keep_artifacts_here
from flows.tracking.logged_models import LoggedModels
from flows.tracking.record_faults import FileFault, fault_of, picture
from flows.tracking.registry import Promotion, register
from flows.tracking.run_pages import NOTE_TAG, pipeline_note, stage_note
from flows.tracking.store_problems import (
    TrackingAway,
    ask_databases_briefly,
    checked_address,
    mlflow_command,
)
from flows.tracking.tier import served_clients, sqlite_address, sqlite_file
from flows.tracking.tracked_datasets import dataset_inputs
from flows.tracking.uploader_lock import uploader_lock
from flows.versioning.setting_overrides import read_params

if TYPE_CHECKING:
    from mlflow.entities import Experiment

POLL_S = 1.0
RETRY_S = 5.0
_GRID_PX = 1024
"""Long edge in the image grid: MLflow takes seconds to pack a picture of 4096 px."""

_KIND_TAG, _TRAINING = "mlflow.experimentKind", "custom_model_development"
"""What MLflow's pages read: the experiment opens on runs, charts and models, not on traces."""
_ORIGIN_TAGS = ("mlflow.source.git.commit", "git.dirty", "settings.sha256", "lock.sha256")


def tracking_config(root: Path) -> dict[str, Any]:
    """mlflow/tracking.yaml with absolute locations."""
    config = yaml.safe_load((root / "mlflow" / "tracking.yaml").read_text(encoding="utf-8"))
    store = config["backend_store"]
    if store.startswith("sqlite:///") and not store.startswith("sqlite:////"):
        store = sqlite_address(root / store.removeprefix("sqlite:///"))
    artifacts = root / config["artifact_root"]
    return {**config, "backend_store": store, "artifact_root": artifacts}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, the served tier's server, or the embedded SQLite store.

    MLflow's client looks for user and password in the environment alone, so those of the served
    tier are set there.

    Raises:
        TrackingAway: MLFLOW_TRACKING_URI is no address.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return checked_address(given)
    served = served_clients(root)
    if not served:
        return str(tracking_config(root)["backend_store"])
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ.setdefault(name, served[name])
    return served["MLFLOW_TRACKING_URI"]


def keep_own_artifacts_here(root: Path, uri: str) -> None:
    """Bring places in the clone's own SQLite store up to date after a copy or a move."""
    config = tracking_config(root)
    if uri == config["backend_store"]:
        keep_artifacts_here(root, uri, config["artifact_root"])


def _experiment_name(root: Path) -> str:
    section = read_params(root).get("project")
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str):
        raise YamlRefused(f"{root / 'params.yaml'}: project.name: expected a text, got {name!r}")
    return name


def use_store(uri: str) -> None:
    """Make `uri` MLflow's global store in this process alone.

    MLflow also writes it to the environment, where another project's connection in this process,
    or a program started for another project, would take it for the user's choice.
    """
    import mlflow

    ask_databases_briefly(uri)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = given


class Uploader:
    """Brings MLflow in step with the records of one project."""

    def __init__(self, root: Path) -> None:
        """Connect; the SQLite store is created where it does not exist.

        Raises:
            TrackingAway: somebody has deleted the project's experiment.
        """
        from mlflow import MlflowClient

        self._root = root
        self.project = _experiment_name(root)
        uri = tracking_uri(root)
        if uri.startswith("sqlite:///"):
            sqlite_file(uri).parent.mkdir(parents=True, exist_ok=True)
            # What MLflow says when it makes its tables is no news to who asked for an upload.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            keep_own_artifacts_here(root, uri)
        # The registry of the SQLite store resolves models through the global URI.
        use_store(uri)
        self.client = MlflowClient(tracking_uri=uri)
        self._uri = uri
        experiment = self._experiment()
        self.experiment_id = str(experiment.experiment_id)
        # By its time of creation: every new store calls its first experiment 1.
        self._store = f"{self.experiment_id}@{experiment.creation_time}"
        self.faults: dict[str, str] = {}
        """What is wrong with records, a line by id: found when they were last looked at."""
        self._ended: set[str] = set()
        self._models = LoggedModels(self.client, self.experiment_id, root)

    def _experiment(self) -> Experiment:
        name = self.project
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            self._refuse_deleted(found)
            if found.tags.get(_KIND_TAG) is None:
                self.client.set_experiment_tag(found.experiment_id, _KIND_TAG, _TRAINING)
            return found
        # A server has its own artifact store; the SQLite store needs to be told one.
        location = None
        if self._uri.startswith("sqlite:"):
            location = Path(tracking_config(self._root)["artifact_root"]).as_uri()
        tags = {_KIND_TAG: _TRAINING}
        made = self.client.create_experiment(name, artifact_location=location, tags=tags)
        return self.client.get_experiment(made)

    def _refuse_deleted(self, experiment: Experiment) -> None:
        if experiment.lifecycle_stage == "deleted":
            back = mlflow_command(self._uri, f"experiments restore -x {experiment.experiment_id}")
            raise TrackingAway(
                f"MLflow's experiment {experiment.name} was deleted: {back} brings it back with "
                "its runs; records stay in runs/records"
            )

    def sync(self) -> int:
        """Upload what is new; returns the number of records that are still not complete.

        One that cannot be sent, or a file of it, is in `faults`: the others are sent.
        """
        open_records = 0
        self.faults = {}
        records = [r for r in all_records(self._root) if r.record_id not in self._ended]
        for record in records:
            # A pipeline's run has to be there for its stages, and is described by them at its end.
            if record.run.kind != "stage":
                state = self._state(record, record.result)
                if state is not None and "run_id" not in state:
                    with self._noting_faults(record):
                        self._create(record, state)
        for record in sorted(records, key=lambda record: record.run.kind != "stage"):
            open_records += 1
            with self._noting_faults(record):
                if self._sync_record(record):
                    self._ended.add(record.record_id)
                    open_records -= 1
        return open_records

    @contextmanager
    def _noting_faults(self, record: Record) -> Iterator[None]:
        try:
            yield
        except Exception as problem:
            fault = fault_of(record, problem, self.client)
            if fault is None:
                raise
            # With an experiment go its runs, and no record is to blame.
            self._refuse_deleted(self.client.get_experiment(self.experiment_id))
            self.faults[record.record_id] = fault

    def _sync_record(self, record: Record) -> bool:
        """Upload one record; True when nothing more can come."""
        result = record.result
        state = self._state(record, result)
        if state is None:
            return True
        if state.get("ended_ms") is not None:
            if result is not None and state["ended_ms"] == result.ended_ms:
                return self._sync_outputs(record, state)
            # The stage was started again under the same key: the run goes on.
            self.client.update_run(state["run_id"], status="RUNNING")
            state["ended_ms"] = None
        if "run_id" not in state and not self._create(record, state):
            return False
        self._metrics(record, state)
        if result is None:
            return False
        self._result(record, state, result)
        self._sync_outputs(record, state)
        self.client.set_terminated(state["run_id"], result.status, end_time=result.ended_ms)
        state["ended_ms"] = result.ended_ms
        write_json(record.folder / "mlflow.json", state)
        # A stage's record may still get its output hashes, or a second attempt; it is looked at
        # again.
        return result.status == "FINISHED" and record.run.kind != "stage"

    def _state(self, record: Record, result: RunResult | None) -> dict[str, Any] | None:
        """How far the upload of a record is; None: another store has all of it.

        After a change between embedded and served tier, what is finished stays where it is: its
        artifacts may have been replaced since. What goes on begins anew here.
        """
        state = read_json(record.folder / "mlflow.json") or {}
        if state.get("store", self._store) == self._store:
            return state | {"store": self._store}
        complete = result is not None and state.get("ended_ms") == result.ended_ms
        return None if complete else {"store": self._store}

    def _create(self, record: Record, state: dict[str, Any]) -> bool:
        from mlflow.entities import Param, RunTag

        run = record.run
        tags = {"ultraflux.record": record.record_id, "ultraflux.kind": run.kind, **run.tags}
        # Code files are the commit's; what is data is not in git.
        data = {path: md5 for path, md5 in run.inputs.items() if path.startswith("data/")}
        tags |= {f"dvc.in.{path}": md5 for path, md5 in data.items()}
        if run.parent is not None:
            above = Record(record.folder.parent / run.parent)
            if above.mlflow_run_id is not None:
                tags["mlflow.parentRunId"] = above.mlflow_run_id
            elif read_json(above.folder / "run.json"):
                return False
        # A run whose answer was lost with the server is taken up, not made twice.
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`ultraflux.record` = '{record.record_id}'", max_results=1
        )
        created = (
            found[0]
            if found
            else self.client.create_run(
                self.experiment_id, start_time=run.started_ms, tags=tags, run_name=run.name
            )
        )
        state.update(run_id=created.info.run_id)
        # MLflow's limit; a longer value refuses the whole batch.
        params = [Param(key, str(value)[:6000]) for key, value in run.params.items()]
        self.client.log_batch(created.info.run_id, params=params, tags=[RunTag("source", "dvc")])
        write_json(record.folder / "mlflow.json", state)
        return True

    def _metrics(self, record: Record, state: dict[str, Any]) -> None:
        """Send what the metric file and the picture folder hold beyond what was sent."""
        from mlflow.entities import Metric

        def note() -> None:
            write_json(record.folder / "mlflow.json", state)

        def send(points: list[metric_feed.Point]) -> None:
            metrics = self._models.judged(record, state["run_id"], points)
            self.client.log_batch(state["run_id"], metrics=metrics)

        def send_load(points: list[metric_feed.Point]) -> None:
            metrics = [Metric(point.key, point.value, point.ms, point.step) for point in points]
            self.client.log_batch(state["run_id"], metrics=metrics)

        if record.run.metrics_file:
            metric_feed.deliver(self._root / record.run.metrics_file, state, send, note)
        if record.run.system_file:
            system = state.setdefault("system", {})
            metric_feed.deliver(self._root / record.run.system_file, system, send_load, note)
        if record.run.images_dir:
            self._images(self._root / record.run.images_dir, state, note)

    def _images(self, folder: Path, state: dict[str, Any], note: Callable[[], None]) -> None:
        """Pictures by step, for the run page's image grid; large ones also as they are."""
        sent = state.setdefault("images", [])
        faults: list[FileFault] = []
        for path in sorted(folder.glob("step-*.png")):
            step = path.stem.removeprefix("step-")
            if path.name in sent or not step.isdecimal():
                continue
            try:
                image, is_large = picture(path, _GRID_PX)
            except FileFault as problem:
                faults.append(problem)
                continue
            if is_large:
                self.client.log_artifact(state["run_id"], str(path), folder.name)
            self.client.log_image(
                state["run_id"], image, key=folder.name, step=int(step), synchronous=True
            )
            # Noted one by one: an image that is sent twice would stand twice in the grid.
            sent.append(path.name)
            note()
        if faults:
            raise faults[0]

    def _result(self, record: Record, state: dict[str, Any], result: RunResult) -> None:
        from mlflow.entities import Metric, RunTag

        run_id = state["run_id"]
        metrics = [Metric(k, v, result.ended_ms, 0) for k, v in result.metrics.items()]
        tags = {**result.tags, "ultraflux.summary": result.summary or result.error[-4000:]}
        if record.run.attempts > 1:
            tags["ultraflux.attempts"] = str(record.run.attempts)
        self.client.log_batch(
            run_id, metrics=metrics, tags=[RunTag(k, str(v)) for k, v in tags.items() if v]
        )
        for artifact in result.artifacts:
            path = self._root / artifact
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(run_id, str(path))
        datasets = dataset_inputs(self._root, record.run, result, record.outputs)
        if datasets:
            self.client.log_inputs(run_id, datasets=datasets)
        if result.status == "FINISHED" and record.run.kind == "stage":
            last = max(state.get("sent", {}).values(), default=0)
            self._models.exported(record, run_id, result.tags, last)
        for promotion in result.promotions:
            path = record.folder / "result.json"
            self._register(record, run_id, from_json(Promotion, promotion, path))
        note = self._note(record, run_id, result)
        if note:
            self.client.set_tag(run_id, NOTE_TAG, note)
        if record.run.kind == "acceptance":
            self._tag_accepted(record)
        parent = record.run.parent
        if parent is not None and metrics:
            # Headline numbers stand on the pipeline run too, named by stage.
            above = read_json(record.folder.parent / parent / "mlflow.json") or {}
            here = above.get("store", self._store) == self._store
            parent_id = above.get("run_id") if here else None
            named = [Metric(f"{record.run.name}.{m.key}", m.value, m.timestamp, 0) for m in metrics]
            if parent_id is not None:
                self.client.log_batch(parent_id, metrics=named)

    def _tag_accepted(self, record: Record) -> None:
        """Say on the run that made a result for which later code a person has let it stand."""
        tags = record.run.tags
        maker = Record(record.folder.parent / tags[MAKER_TAG]).mlflow_run_id
        if not tags[MAKER_TAG] or maker is None:
            return
        known = self.client.get_run(maker).data.tags.get(ACCEPTED_TAG, "")
        line = tags[ACCEPTED_TAG]
        if line not in known:
            self.client.set_tag(maker, ACCEPTED_TAG, f"{known}\n{line}" if known else line)

    def _register(self, record: Record, run_id: str, promotion: Promotion) -> None:
        """A version carries what its weights came from: commit, settings, packages, DVC hash."""
        tags = {name: record.run.tags[name] for name in _ORIGIN_TAGS if name in record.run.tags}
        if promotion.path in record.run.inputs:
            tags["dvc.md5"] = record.run.inputs[promotion.path]
        described = replace(promotion, tags=tags | promotion.tags)
        register(self.client, self.experiment_id, run_id, described, root=self._root)

    def _note(self, record: Record, run_id: str, result: RunResult) -> str:
        if record.run.kind == "stage":
            return stage_note(self.experiment_id, run_id, result)
        if record.run.kind == "acceptance":
            return result.summary
        stages = [r for r in all_records(self._root) if r.run.kind == "stage"]
        known = {r.record_id: r for r in stages}
        known |= {r.mlflow_run_id: r for r in stages if r.mlflow_run_id}
        return pipeline_note(self.experiment_id, run_id, result, known)

    def _sync_outputs(self, record: Record, state: dict[str, Any]) -> bool:
        """Tag the DVC hashes; True when they are there."""
        outputs = record.outputs
        if outputs and not state.get("outputs"):
            for path, md5 in outputs.items():
                self.client.set_tag(state["run_id"], f"dvc.out.{path}", md5)
            state["outputs"] = True
            write_json(record.folder / "mlflow.json", state)
        return bool(state.get("outputs"))


def follow(root: Path) -> bool:
    """Upload until standard input closes, then once more; errors are printed once and retried.

    So are faults of records, which no server cures: they do not hold up the end.

    Returns:
        Whether MLflow has everything.
    """
    complained = False
    said: set[str] = set()
    uploader: Uploader | None = None
    closing_since: float | None = None
    with uploader_lock(root):
        while True:
            if closing_since is None and _stdin_closed(POLL_S if uploader else 0.0):
                closing_since = time.monotonic()
            try:
                uploader = uploader or Uploader(root)
                uploader.sync()
                for fault in set(uploader.faults.values()) - said:
                    print(f"tracking: {fault}", file=sys.stderr)
                    said.add(fault)
                if complained:
                    print("tracking: connected again", file=sys.stderr)
                    complained = False
                if closing_since is not None:
                    return not uploader.faults
            except Exception as problem:
                if not complained:
                    text = " ".join(str(problem).split())[:300]
                    print(f"tracking: not uploaded yet ({text}); retrying", file=sys.stderr)
                    complained = True
                if closing_since is not None and time.monotonic() - closing_since > RETRY_S:
                    print(
                        "tracking: not everything is uploaded; nothing is lost, "
                        "send it later with `ultraflux sync`",
                        file=sys.stderr,
                    )
                    return False
                time.sleep(RETRY_S / 5)


def _stdin_closed(wait_s: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    environment.prepare()
    sys.exit(0 if follow(Path(sys.argv[1])) else 1)
