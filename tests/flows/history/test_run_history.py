"""One page of runs, whatever started them and wherever they ran."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.commands.pipeline.history import history
from flows.experiments.reproduction import find_recorded
from flows.history.run_evidence import Evidence
from flows.history.run_history import PREFECT_FILE, REPRODUCES_TAG, pipeline_records, run_history
from flows.records.owners import OWNER_FILE, own_record
from flows.records.provenance import provenance_tags
from flows.records.records import RunDescription, RunResult, open_record, read_json, write_json


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A pipeline, a stage of it, a stage alone, a submission, and a killed pipeline."""
    root = tmp_path
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "params.yaml").write_text("{}\n")
    pipeline = RunDescription(
        kind="pipeline",
        name="pipeline",
        tags={
            "ultraflux.engine": "prefect",
            "mlflow.source.git.commit": "0123456789",
            "git.dirty": "true",
        },
        started_ms=1_000,
    )
    first = open_record(root, pipeline)
    write_json(first.folder / "mlflow.json", {"run_id": "m1", "store": "1@s"})
    write_json(first.folder / PREFECT_FILE, {"flow_run_id": "p1"})
    stage = RunDescription(kind="stage", name="vae", parent=first.record_id, started_ms=2_000)
    open_record(root, stage).finish(RunResult(status="FINISHED"))
    first.finish(RunResult(status="FAILED", summary="1 failed", ended_ms=61_000))
    alone = replace(stage, parent=None, tags={"dvc.experiment": "hazy-lynx"}, started_ms=3_000)
    open_record(root, alone).finish(RunResult(status="FINISHED", ended_ms=4_000))
    tree = root / "runs" / "submitted" / "abcd"
    open_record(tree, replace(pipeline, started_ms=4_000)).finish(RunResult(status="FINISHED"))
    killed = open_record(root, replace(pipeline, started_ms=5_000))
    own_record(root, killed.record_id)
    owner = read_json(killed.folder / OWNER_FILE)
    write_json(killed.folder / OWNER_FILE, owner | {"started": owner["started"] - 60, "ticks": 1})
    return root


def test_every_run_once_the_newest_first_with_its_places(ran: Path) -> None:
    lines = list(run_history(ran))
    assert [(line.kind, line.started_ms, line.tree) for line in lines] == [
        ("pipeline", 5_000, ""),
        ("pipeline", 4_000, "runs/submitted/abcd"),
        ("vae", 3_000, ""),
        ("pipeline", 1_000, ""),
    ]
    failed = lines[-1]
    assert (failed.status, failed.seconds, failed.summary) == ("FAILED", 60.0, "1 failed")
    assert (failed.mlflow_run, failed.prefect_run, failed.engine) == ("m1", "p1", "prefect")
    assert (failed.commit, failed.is_dirty) == ("0123456789", True)
    assert lines[2].experiment == "hazy-lynx"
    assert [record.run.started_ms for record in pipeline_records(ran)] == [1_000, 4_000, 5_000]


@pytest.mark.parametrize(
    "tree", ["submitted/a1", "sweep/lr/set0", "ablate/ladder/snr-hw", "reproduce/pipeline-x"]
)
def test_runs_of_every_kind_of_working_tree_are_the_clones(tmp_path: Path, tree: str) -> None:
    place = tmp_path / "runs" / tree
    run = RunDescription(kind="pipeline", name="pipeline", started_ms=1_000)
    open_record(place, run).finish(RunResult(status="FINISHED", ended_ms=2_000))
    lines = list(run_history(tmp_path))
    assert [(line.tree, line.status) for line in lines] == [(f"runs/{tree}", "FINISHED")]


def test_what_history_lists_of_a_working_tree_other_commands_know(
    toy: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = RunDescription(kind="pipeline", name="pipeline", tags=provenance_tags(toy))
    of_set = open_record(toy / "runs" / "sweep" / "lr-0" / "set0", run)
    (of_set.folder / "dvc.lock").write_text("stages: {}\n")
    of_set.finish(RunResult(status="FINISHED"))
    name = of_set.record_id
    assert name in typed(toy, "lineage", name, "--no-mlflow").stdout
    assert json.loads(typed(toy, "compare", name, "HEAD", "--json").stdout)["runs"][0] == name
    assert find_recorded(Evidence(toy, mlflow=False), name).name == name
    # A reproduction is newer than what it repeats, and is not what `pipeline` means.
    again = replace(run, tags=run.tags | {REPRODUCES_TAG: name}, started_ms=run.started_ms + 1)
    open_record(toy / "runs" / "reproduce" / name, again).finish(RunResult(status="FINISHED"))
    assert find_recorded(Evidence(toy, mlflow=False), "pipeline").name == name
    assert name in typed(toy, "lineage", "pipeline", "--no-mlflow").stdout
    sweep = open_record(toy, RunDescription(kind="sweep", name="sweep-lr-0")).record_id
    for command in (["lineage", sweep], ["compare", sweep, "HEAD"], ["reproduce", sweep]):
        done = typed(toy, *command, "--no-mlflow")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {sweep}: a sweep; name the run of one of its sets")


def test_a_killed_set_of_a_sweep_is_closed_too(
    toy: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    tree = toy / "runs" / "sweep" / "lr" / "set0"
    record = open_record(tree, RunDescription(kind="pipeline", name="pipeline"))
    own_record(tree, record.record_id)
    owner = read_json(record.folder / OWNER_FILE)
    write_json(record.folder / OWNER_FILE, owner | {"ticks": owner["ticks"] - 1})
    said = json.loads(typed(toy, "history", "--json").stdout)
    assert [line["status"] for line in said] == ["KILLED"]


def test_the_command_says_killed_of_what_was_killed(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran)
    history(limit=0, html=None, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert [line["status"] for line in said] == ["KILLED", "FINISHED", "FINISHED", "FAILED"]
    assert said[0]["summary"] == "its process ended without a result"
    monkeypatch.setenv("COLUMNS", "80")
    history(limit=0, html=None, as_json=False)
    words = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    # A record is what other commands take: whole, and first on its line.
    assert [line.split()[0] for line in words if line[:1].strip()] == [r["record"] for r in said]
    assert max(map(len, words)) <= 80
    assert words[0].split()[1] == "killed"
    assert "    01234567+  MLflow m1  Prefect p1" in words
    assert "  experiment hazy-lynx" in "\n".join(words)
    assert "(in runs/submitted/abcd)" in "\n".join(words)
    history(limit=1, html=None, as_json=False)
    assert "3 older runs: --limit 0 shows all" in capsys.readouterr().out


def test_the_page_links_what_a_server_shows_and_escapes_what_runs_said(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = RunDescription(kind="sweep", name="<b>grid", started_ms=6_000)
    open_record(ran, odd).finish(RunResult(status="FAILED", error="<script>alert(1)</script>"))
    monkeypatch.chdir(ran)
    page = ran / "pages" / "history.html"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    history(limit=0, html=page, as_json=False)
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "href" not in text
    assert "No MLflow server runs" in text
    assert "No Prefect server runs" in text
    assert "<script>" not in text
    assert "<b>grid" not in text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("PREFECT_API_URL", "http://flows:4200/api")
    history(limit=0, html=page, as_json=False)
    text = page.read_text()
    # The one run that both servers know.
    assert text.count("<a href=") == 2
    assert 'href="http://tracking:5000/#/experiments/1/runs/m1"' in text
    assert 'href="http://flows:4200/runs/flow-run/p1"' in text
    assert "5 of 5 runs" in text
    for said in ("hazy-lynx", "in runs/submitted/abcd", "01234567", "with edits", "killed"):
        assert said in text
    history(limit=2, html=page, as_json=False)
    assert "2 of 5 runs" in page.read_text()
