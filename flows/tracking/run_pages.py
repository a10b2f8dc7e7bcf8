"""Addresses of runs in both UIs, and the description on a run's MLflow page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flows.records.records import Record, RunResult

NOTE_TAG = "mlflow.note.content"


def run_url(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Of a run or one of its artifacts, relative to the MLflow server's page."""
    path = f"#/experiments/{experiment_id}/runs/{run_id}"
    return f"{path}/artifactPath/{artifact}" if artifact else path


def shown_run_url(
    ui: str | None, experiment_id: str | None, run_id: str | None, artifact: str = ""
) -> str | None:
    """Page of a run or of one of its artifacts; None where no server shows it.

    Args:
        ui: address of the MLflow UI.
        experiment_id: on its server; None or empty before the run was sent.
        run_id: likewise.
        artifact: path below the run's artifacts.
    """
    if not (ui and experiment_id and run_id):
        return None
    return f"{ui}/{run_url(experiment_id, run_id, artifact)}"


def flow_run_url(ui: str, flow_run_id: str) -> str:
    """Page of a flow run.

    Args:
        ui: address of the Prefect UI.
        flow_run_id: of the run.
    """
    return f"{ui}/runs/flow-run/{flow_run_id}"


def record_url(record: Record, pages: str | None, artifact: str = "") -> str | None:
    """Address of a record's run or of one of its artifacts; None where no server shows it.

    Args:
        record: of a stage or pipeline.
        pages: address of the MLflow UI.
        artifact: path below the run's artifacts.
    """
    return shown_run_url(pages, record.experiment_id, record.mlflow_run_id, artifact)


def stage_note(experiment_id: str, run_id: str, result: RunResult) -> str:
    """Summary of a stage, its pages and its Parquet tables of rows (such as rejected ones)."""
    links = [
        f"- [{name}]({run_url(experiment_id, run_id, name)})"
        for name in (Path(path).name for path in result.artifacts)
        if name.endswith((".html", ".parquet"))
    ]
    return "\n".join([result.summary or "", "", *links]).strip()


def pipeline_note(
    experiment_id: str,
    run_id: str,
    result: RunResult,
    records: Mapping[str, Record],
) -> str:
    """Summary, a line per stage with the run that made its result, and that run's pages.

    Args:
        experiment_id: of all these runs.
        run_id: of the pipeline.
        result: of the pipeline; its tags name the stages' runs.
        records: stage records by record id and by MLflow run id.
    """
    lines = [stage_note(experiment_id, run_id, result), ""]
    for tag, made_by in result.tags.items():
        stage = tag.removeprefix("stage.").removesuffix(".run_id")
        record = records.get(made_by)
        if not tag.endswith(".run_id") or record is None or record.mlflow_run_id is None:
            continue
        made = record.mlflow_run_id
        status = result.tags.get(f"stage.{stage}", "")
        line = f"- [{stage}]({run_url(experiment_id, made)}) {status}"
        artifacts = record.result.artifacts if record.result is not None else []
        pages = [Path(path).name for path in artifacts if path.endswith(".html")]
        named = [f"[{page}]({run_url(experiment_id, made, page)})" for page in pages]
        lines.append(": ".join([line, ", ".join(named)] if named else [line]))
    return "\n".join(lines).strip()
