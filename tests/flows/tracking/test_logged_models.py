"""Checkpoints and exports in MLflow's own list of models: searched, found once, registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.records.records import Record, RunDescription, RunResult, open_record, read_json
from flows.tracking.uploader import Uploader

LATENTS, VERSION = "data/latents", "e" * 32 + ".dir"
DIGEST = "a" * 64


@pytest.fixture
def uploader(toy: Path, give_store: Callable[[Path], None]) -> Uploader:
    give_store(toy)
    return Uploader(toy)


def trained(root: Path, losses: dict[int, float], key: str) -> Record:
    """The record of a stage that judged its weights at some steps."""
    log = root / "runs" / f"{key}.jsonl"
    rows: list[dict[str, Any]] = [
        {"step": step, "time_ms": 1000 + step, "loss": 1.0}
        | ({"validation_loss": losses[step]} if step in losses else {})
        for step in range(max(losses) + 1)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDescription(
        kind="stage",
        name="dit_stage2",
        stage_key=key,
        metrics_file=f"runs/{key}.jsonl",
        inputs={LATENTS: VERSION},
    )
    return open_record(root, run)


def models(uploader: Uploader, kind: str, **search: Any) -> list[Any]:
    found = uploader.client.search_logged_models(
        [uploader.experiment_id], f"tags.`ultraflux.model.kind` = '{kind}'", **search
    )
    return list(found)


def best_first(uploader: Uploader, digest: str) -> list[tuple[str | None, str]]:
    """(record, step) of the checkpoints, by their loss on one version of the held-out table."""
    order = {
        "field_name": "metrics.validation_loss",
        "ascending": True,
        "dataset_name": "latents",
        "dataset_digest": digest,
    }
    return [
        (model.source_run_id, model.params["step"])
        for model in models(uploader, "checkpoint", order_by=[order])
    ]


def test_the_best_checkpoint_is_a_search_over_runs_and_steps(toy: Path, uploader: Uploader) -> None:
    one = trained(toy, {2: 0.5, 4: 0.2, 6: 0.4}, "one")
    two = trained(toy, {2: 0.3, 4: 0.1}, "two")
    uploader.sync()
    first, second = str(one.mlflow_run_id), str(two.mlflow_run_id)
    assert best_first(uploader, VERSION) == [
        (second, "4"),
        (first, "4"),
        (second, "2"),
        (first, "6"),
        (first, "2"),
    ]
    (model,) = [m for m in models(uploader, "checkpoint") if m.params["step"] == "6"]
    assert (model.name, str(model.status)) == ("dit_stage2", "READY")
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step) == ("validation_loss", 0.4, 6)
    assert (metric.dataset_name, metric.dataset_digest) == ("latents", VERSION)
    # The curve of the run is what it was: a step in which nothing was judged names no model.
    history = uploader.client.get_metric_history(first, "validation_loss")
    assert [point.step for point in history] == [2, 4, 6]
    outputs = uploader.client.get_run(first).outputs.model_outputs
    assert sorted(one.step for one in outputs) == [2, 4, 6]
    experiment = uploader.client.get_experiment(uploader.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_uploader_that_dies_anywhere_makes_no_model_twice(toy: Path, uploader: Uploader) -> None:
    record = trained(toy, {2: 0.5, 4: 0.2}, "one")
    (toy / "data/dit_stage2/ema").mkdir(parents=True)
    record.finish(
        RunResult(
            status="FINISHED",
            metrics={"validation_loss_last": 0.2},
            tags={"weights.ema": DIGEST},
        )
    )
    record.set_outputs({"data/dit_stage2": "0" * 32})
    uploader.sync()
    note = record.folder / "mlflow.json"
    whole = read_json(note)
    # What it had written down when it was killed: nothing, the run, the request without an answer.
    pending = [["validation_loss", 0.2, 1004, 4]]
    for state in (
        {},
        {"store": whole["store"], "run_id": whole["run_id"]},
        whole | {"ended_ms": None, "pending": pending},
    ):
        note.write_text(json.dumps(state))
        Uploader(toy).sync()
        assert sorted(m.params["step"] for m in models(uploader, "checkpoint")) == ["2", "4"]
        (export,) = models(uploader, "export")
        (run,) = uploader.client.search_runs([uploader.experiment_id])
        assert len(run.outputs.model_outputs) == 3
        for key, count in (("validation_loss", 2), ("validation_loss_last", 1)):
            assert len(uploader.client.get_metric_history(run.info.run_id, key)) == count
        assert len(export.metrics) == 1


def test_a_registered_version_points_at_the_export_of_the_run_that_trained_it(
    toy: Path, uploader: Uploader
) -> None:
    record = trained(toy, {2: 0.5}, "one")
    record.finish(
        RunResult(
            status="FINISHED",
            metrics={"validation_loss_last": 0.5},
            tags={"weights.ema": DIGEST, "weights.raw": "b" * 64},
        )
    )
    gate = open_record(toy, RunDescription(kind="stage", name="promote"))
    promotion = {
        "model": "toy-transformer",
        "path": "data/dit_stage2/ema",
        "digest": DIGEST,
        "alias": "candidate",
    }
    gate.finish(RunResult(status="FINISHED", promotions=[promotion]))
    uploader.sync()
    version = uploader.client.get_model_version_by_alias("toy-transformer", "candidate")
    pointed = uploader.client.get_logged_model(version.source.removeprefix("models:/"))
    assert pointed.name == "dit_stage2-ema"
    assert pointed.source_run_id == record.mlflow_run_id
    assert {metric.key: metric.value for metric in pointed.metrics} == {"validation_loss_last": 0.5}
    assert pointed.tags["weights.path"] == "data/dit_stage2/ema"
