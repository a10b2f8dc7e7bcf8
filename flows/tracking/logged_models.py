"""Checkpoints and exports as MLflow's logged models: what a search for the best one finds.

A checkpoint is a model for each step at which a stage's weights were judged on held-out data, with
what was measured and on which table; an export is one for each folder of weights that a stage
wrote. Weights stay where they are (models of MLflow's kind "external"); a tag says where.

    mlflow.search_logged_models(
        experiment_ids=[ID],
        filter_string="tags.`ultraflux.model.kind` = 'checkpoint' AND name = 'dit_stage2'",
        order_by=[{"field_name": "metrics.validation_loss", "ascending": True}],
    )

A model is found again by a tag of the record, the kind and the step, so that an uploader that dies
between its requests makes none twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.records.records import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

    from flows.tracking.metric_feed import Point

JUDGED = ("validation_loss", "validation_loss_ema", "psnr_db")
"""Metrics of a stage's own log that judge its weights on held-out data."""
HELD_OUT = ("data/slices/eval.parquet", "data/latents")
"""What a stage judges on: the decoder on photographs, the transformer on their latents."""
KEY_TAG, KIND_TAG = "ultraflux.model", "ultraflux.model.kind"
DIGEST_TAG, PATH_TAG = "weights.sha256", "weights.path"
_EXPORT_PREFIX = "weights."
"""Of a result's tags: `weights.ema` is the digest of `data/<stage>/ema`."""


def weights_digests(tags: Mapping[str, str]) -> dict[str, str]:
    """Digest by the name of the folder below data/<stage>/."""
    return {
        name.removeprefix(_EXPORT_PREFIX): digest
        for name, digest in tags.items()
        if name.startswith(_EXPORT_PREFIX)
    }


class LoggedModels:
    """Finds or makes the logged models of one experiment."""

    def __init__(self, client: MlflowClient, experiment_id: str, root: Path) -> None:
        """Of the clone at `root`."""
        self._client, self._experiment, self._root = client, experiment_id, root
        self._known: dict[str, str] = {}

    def judged(self, record: Record, run_id: str, points: Iterable[Point]) -> list[Metric]:
        """Points of a stage as metrics; those that judge weights name their model and table."""
        from mlflow.entities import Metric

        read = [path for path in HELD_OUT if path in record.run.inputs]
        held_out: dict[str, Any] = {}
        if read:
            name = read[0].removeprefix("data/").removesuffix(".parquet")
            held_out = {"dataset_name": name, "dataset_digest": record.run.inputs[read[0]]}
        found = []
        for point in points:
            about: dict[str, Any] = {}
            if point.key in JUDGED:
                model_id = self._checkpoint(record, run_id, point.step)
                about = {"model_id": model_id, **held_out}
            found.append(Metric(point.key, point.value, point.ms, point.step, **about))
        return found

    def _checkpoint(self, record: Record, run_id: str, step: int) -> str:
        key = f"{record.record_id}/{step}"
        if key not in self._known:
            model = self._made(
                key,
                name=record.run.name,
                run_id=run_id,
                step=step,
                tags={KIND_TAG: "checkpoint"},
                folder=None,
            )
            self._known[key] = model.model_id
        return self._known[key]

    def exported(self, record: Record, run_id: str, tags: Mapping[str, str], step: int) -> None:
        """Make the models of the folders that a finished stage wrote, with its headline metrics.

        Args:
            record: of the stage.
            run_id: its run.
            tags: of its result.
            step: the last one of its log.
        """
        from mlflow.entities import Metric

        result = record.result
        if result is None:
            return
        for folder, digest in weights_digests(tags).items():
            path = f"data/{record.run.name}/{folder}"
            model = self._made(
                f"{record.record_id}/{folder}",
                name=f"{record.run.name}-{folder}",
                run_id=run_id,
                step=step,
                tags={KIND_TAG: "export", DIGEST_TAG: digest, PATH_TAG: path},
                folder=path,
            )
            # The very points of the run, which MLflow keeps once.
            metrics = [
                Metric(name, value, result.ended_ms, 0, model_id=model.model_id)
                for name, value in result.metrics.items()
            ]
            if metrics:
                self._client.log_batch(run_id, metrics=metrics)

    def with_digest(self, digest: str) -> LoggedModel | None:
        """The export of these weights, the newest where several runs made the same bytes."""
        found = self._client.search_logged_models(
            [self._experiment], filter_string=f"tags.`{DIGEST_TAG}` = '{digest}'"
        )
        ready = [model for model in found if (model.tags or {}).get(KIND_TAG) == "export"]
        return max(ready, key=lambda model: model.creation_timestamp) if ready else None

    def _made(
        self,
        key: str,
        *,
        name: str,
        run_id: str,
        step: int,
        tags: dict[str, str],
        folder: str | None,
    ) -> LoggedModel:
        """The model with this key, made where there is none, and finished where a kill left it."""
        found = self._client.search_logged_models(
            [self._experiment], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        if found:
            model = found[0]
        else:
            from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

            # As `mlflow.create_external_model` does, which would use the process's global store.
            model = self._client.create_logged_model(
                self._experiment,
                name=name,
                source_run_id=run_id,
                tags={KEY_TAG: key, MLFLOW_MODEL_IS_EXTERNAL: "true", **tags},
                params={"step": str(step)},
            )
        if str(model.status) != "READY":
            describe(self._client, model, None if folder is None else self._root / folder)
            self._client.finalize_logged_model(model.model_id, "READY")
        self._link(run_id, model.model_id, step)
        return model

    def _link(self, run_id: str, model_id: str, step: int) -> None:
        """Name the model among the run's outputs, once."""
        from mlflow.entities import LoggedModelOutput

        outputs = self._client.get_run(run_id).outputs
        known = {one.model_id for one in outputs.model_outputs} if outputs else set()
        if model_id not in known:
            self._client.log_outputs(run_id, models=[LoggedModelOutput(model_id, step)])


def describe(client: MlflowClient, logged: LoggedModel, folder: Path | None) -> None:
    """Write the `MLmodel` file, with the signature where the weights' configuration is there."""
    from mlflow.models import Model

    from flows.tracking.model_signatures import signature_of

    described = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=logged.source_run_id,
        signature=None if folder is None else signature_of(folder),
    )
    with tempfile.TemporaryDirectory() as aside:
        described.save(str(Path(aside) / "MLmodel"))
        client.log_model_artifacts(logged.model_id, aside)
