"""Run records reach a real MLflow store; nothing is lost when it is away."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pandas
import pytest
from PIL import Image

from flows.commands.refusals import FAILED, refusal
from flows.records.records import (
    Record,
    RunDescription,
    RunResult,
    close_interrupted,
    latest_finished,
    open_record,
    read_json,
    write_json,
)
from flows.services import servers
from flows.tracking import artifact_places
from flows.tracking.registry import Promotion
from flows.tracking.store_problems import DamagedStore, TrackingAway, refuse_damaged
from flows.tracking.sync import sync_now
from flows.tracking.uploader import Uploader, tracking_uri

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def uploader(toy: Path, give_store: Callable[[Path], None]) -> Uploader:
    give_store(toy)
    return Uploader(toy)


def stage_record(root: Path, parent: Record | None, key: str = "k") -> Record:
    (root / "runs" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n" for step in range(1200))
    )
    line = {"step": 0, "time_ms": 1, "system/cpu_utilization_percentage": 40.0}
    (root / "runs" / "system.jsonl").write_text(json.dumps(line) + "\n")
    return open_record(
        root,
        RunDescription(
            kind="stage",
            name="vae",
            stage_key=key,
            parent=parent.record_id if parent else None,
            metrics_file="runs/metrics.jsonl",
            system_file="runs/system.jsonl",
            params={"vae.steps": 300},
            tags={"lock.sha256": "abc"},
        ),
    )


def test_a_record_becomes_a_child_run_with_metrics_artifacts_and_datasets(
    toy: Path, uploader: Uploader
) -> None:
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    record = stage_record(toy, pipeline)
    uploader.sync()
    run_id = record.mlflow_run_id
    assert run_id is not None
    assert uploader.client.get_run(run_id).info.status == "RUNNING"
    (toy / "data" / "note.txt").write_text("hello")
    pandas.DataFrame({"image_id": ["x"]}).to_parquet(toy / "data" / "m.parquet")
    record.finish(
        RunResult(
            status="FINISHED",
            metrics={"psnr_gain_db": 4.5},
            artifacts=["data/note.txt"],
            datasets={"corpus": "data/m.parquet"},
            tags={"weights.sha256": "w"},
            summary="fine",
        )
    )
    record.set_outputs({"data/vae": "0" * 32})
    pipeline.finish(RunResult(status="FINISHED"))
    uploader.sync()
    run = uploader.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == pipeline.mlflow_run_id
    assert run.data.tags["dvc.out.data/vae"] == "0" * 32
    assert run.data.params == {"vae.steps": "300"}
    assert run.data.metrics["psnr_gain_db"] == 4.5
    assert len(uploader.client.get_metric_history(run_id, "loss")) == 1200
    assert [item.path for item in uploader.client.list_artifacts(run_id)] == ["note.txt"]
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["m"]
    load = uploader.client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert [(metric.step, metric.value) for metric in load] == [(0, 40.0)]
    parent = uploader.client.get_run(str(pipeline.mlflow_run_id))
    assert parent.data.metrics["vae.psnr_gain_db"] == 4.5
    assert latest_finished(toy, "vae") == record


def test_tables_are_datasets_with_their_dvc_hash_for_writer_and_reader(
    toy: Path, uploader: Uploader
) -> None:
    import mlflow.data

    table = pandas.DataFrame(
        {"image_id": ["x", "y"], "width": [4096, 5120], "kept": [True, None], "boxes": [[1.0], []]}
    )
    path = toy / "data" / "slices" / "stage1.parquet"
    path.parent.mkdir()
    table.to_parquet(path, index=False)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    named = "data/slices/stage1.parquet"
    wrote = open_record(toy, RunDescription(kind="stage", name="slices"))
    wrote.finish(RunResult(status="FINISHED", datasets={"stage1": named}))
    # The reader's record is of an older table of the same name: its columns are not known now.
    inputs = {named: md5, "data/slices/eval.parquet": "0" * 32, "components/x.py": "1" * 32}
    read = open_record(toy, RunDescription(kind="stage", name="dit_stage1", inputs=inputs))
    read.finish(RunResult(status="FINISHED"))
    uploader.sync()
    runs = [uploader.client.get_run(str(r.mlflow_run_id)) for r in (wrote, read)]
    found = [
        {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs}
        for run in runs
    ]
    assert found[0] == {("slices/stage1", md5, "output")}
    assert found[1] == {("slices/stage1", md5, "input"), ("slices/eval", "0" * 32, "input")}
    dataset = runs[0].inputs.dataset_inputs[0].dataset
    columns = {one["name"]: one["type"] for one in json.loads(dataset.schema)["mlflow_colspec"]}
    assert columns == {"image_id": "string", "width": "long", "kept": "boolean", "boxes": "array"}
    assert json.loads(dataset.profile)["num_rows"] == 2
    source = mlflow.data.get_source(dataset)  # type: ignore[attr-defined]
    assert source.uri == named


def test_the_pages_of_a_pipeline_link_to_its_stages_and_their_reports(
    toy: Path, uploader: Uploader
) -> None:
    for name in ("contract_report.html", "failed_rows.parquet", "crops.png"):
        (toy / "data" / name).write_text("x")
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    gate = RunDescription(kind="stage", name="validate", parent=pipeline.record_id)
    stage = open_record(toy, gate)
    files = ["data/contract_report.html", "data/failed_rows.parquet", "data/crops.png"]
    stage.finish(RunResult(status="FINISHED", artifacts=files, summary="20 of 21 hold"))
    tags = {"stage.validate": "ran", "stage.validate.run_id": stage.record_id}
    pipeline.finish(RunResult(status="FINISHED", tags=tags, summary="1 ran"))
    # Everything at once, as after a day without the server.
    uploader.sync()
    made = str(stage.mlflow_run_id)
    link = f"#/experiments/{uploader.experiment_id}/runs/{made}"
    note = uploader.client.get_run(made).data.tags["mlflow.note.content"]
    assert note.startswith("20 of 21 hold")
    for name in ("contract_report.html", "failed_rows.parquet"):
        assert f"[{name}]({link}/artifactPath/{name})" in note
    listed = {item.path for item in uploader.client.list_artifacts(made)}
    assert {"contract_report.html", "failed_rows.parquet"} <= listed
    above = uploader.client.get_run(str(pipeline.mlflow_run_id)).data.tags["mlflow.note.content"]
    page = f"[contract_report.html]({link}/artifactPath/contract_report.html)"
    assert f"- [validate]({link}) ran: {page}" in above


def test_a_version_has_a_signature_and_says_what_its_weights_came_from(
    toy: Path, uploader: Uploader
) -> None:
    import mlflow.models

    folder = toy / "data" / "vae" / "autoencoder"
    folder.mkdir(parents=True)
    config = {"_class_name": "AutoencoderKLF16", "in_channels": 3, "out_channels": 3}
    (folder / "config.json").write_text(json.dumps(config))
    came_from = {
        "mlflow.source.git.commit": "c0ffee",
        "settings.sha256": "5" * 64,
        "lock.sha256": "6" * 64,
        "host": "not of the version",
    }
    where = "data/vae/autoencoder"
    run = RunDescription(kind="stage", name="promote", tags=came_from, inputs={where: "7" * 32})
    record = open_record(toy, run)
    promotion = {"model": "toy-vae", "path": where, "digest": "d" * 64, "alias": "candidate"}
    record.finish(RunResult(status="FINISHED", promotions=[promotion]))
    uploader.sync()
    version = uploader.client.get_model_version_by_alias("toy-vae", "candidate")
    del came_from["host"]
    expected = came_from | {"dvc.md5": "7" * 32, "weights.sha256": "d" * 64, "weights.path": where}
    assert {name: version.tags.get(name) for name in expected} == expected
    assert "host" not in version.tags
    signature = mlflow.models.get_model_info("models:/toy-vae@candidate").signature
    assert [spec.shape for spec in signature.inputs.inputs] == [(-1, 3, -1, -1)]


def test_sample_pictures_are_logged_by_step_and_once(toy: Path, uploader: Uploader) -> None:
    folder = toy / "runs" / "samples"
    folder.mkdir()
    run = RunDescription(kind="stage", name="dit_stage1", images_dir="runs/samples")
    record = open_record(toy, run)
    for step, width_px in ((40, 8), (80, 2048)):
        Image.new("RGB", (width_px, 8), "red").save(folder / f"step-{step:08d}.png")
        uploader.sync()
        uploader.sync()
    listed = uploader.client.list_artifacts(str(record.mlflow_run_id), "images")
    names = sorted(Path(item.path).name for item in listed if item.path.endswith(".png"))
    assert [name.split("+")[:3] for name in names] == [
        ["samples", "step", "40"],
        ["samples", "step", "80"],
    ]
    # Larger than the grid shows: the picture itself is kept beside it.
    whole = uploader.client.list_artifacts(str(record.mlflow_run_id), "samples")
    assert [item.path for item in whole] == ["samples/step-00000080.png"]


def test_an_unfinished_run_with_the_same_key_is_continued(toy: Path, uploader: Uploader) -> None:
    pipeline = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    first = stage_record(toy, pipeline)
    uploader.sync()
    close_interrupted(toy, pipeline.record_id)
    uploader.sync()
    run_id = str(first.mlflow_run_id)
    assert uploader.client.get_run(run_id).info.status == "KILLED"
    again = stage_record(toy, pipeline)
    assert again == first
    uploader.sync()
    assert uploader.client.get_run(run_id).info.status == "RUNNING"
    again.finish(RunResult(status="FINISHED"))
    uploader.sync()
    assert uploader.client.get_run(run_id).info.status == "FINISHED"
    assert stage_record(toy, pipeline) != first
    assert stage_record(toy, pipeline, key="other") != first


def test_promotion_sets_the_alias_once_and_is_idempotent(toy: Path, uploader: Uploader) -> None:
    record = stage_record(toy, None)
    promotion = {
        "model": "toy-vae",
        "path": "data/vae",
        "digest": "d" * 64,
        "alias": "candidate",
        "tags": {"gate.rule": "1 (needs 0)"},
    }
    record.finish(RunResult(status="FINISHED", promotions=[promotion]))
    uploader.sync()
    version = uploader.client.get_model_version_by_alias("toy-vae", "candidate")
    assert version.version == 1 or version.version == "1"
    assert version.tags["weights.sha256"] == "d" * 64
    from flows.tracking.registry import register

    again = register(
        uploader.client,
        uploader.experiment_id,
        None,
        Promotion(**promotion),  # type: ignore[arg-type]
    )
    assert str(again.version) == "1"
    refused = Promotion("toy-vae", "data/vae", "e" * 64, None)
    assert str(register(uploader.client, uploader.experiment_id, None, refused).version) == "2"
    version = uploader.client.get_model_version_by_alias("toy-vae", "candidate")
    assert str(version.version) == "1"


def test_with_the_server_away_the_uploader_says_so_once_and_loses_nothing(
    toy: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = stage_record(toy, None)
    record.finish(RunResult(status="FINISHED"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = subprocess.run(
        [sys.executable, "-m", "flows.tracking.uploader", str(toy)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ultraflux sync" in done.stderr
    assert record.mlflow_run_id is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    uploader = Uploader(toy)
    uploader.sync()
    run = uploader.client.get_run(str(record.mlflow_run_id))
    assert run.info.status == "FINISHED"
    assert len(uploader.client.get_metric_history(run.info.run_id, "loss")) == 1200


def test_two_projects_in_one_process_keep_their_own_stores(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    other = tmp_path / "other"
    (other / "mlflow").mkdir(parents=True)
    for name in ("params.yaml", "mlflow/tracking.yaml"):
        shutil.copy2(toy / name, other / name)
    uris = []
    for project in (toy, other):
        record = stage_record(project, None) if project == toy else None
        uploader = Uploader(project)
        uploader.sync()
        uris.append(uploader.client.tracking_uri)
        runs = uploader.client.search_runs([uploader.experiment_id])
        assert len(runs) == (1 if record else 0)
    assert uris[0] != uris[1]
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_copied_or_moved_clone_keeps_its_artifacts_below_itself(
    toy: Path, uploader: Uploader, tmp_path: Path
) -> None:
    def send(root: Path, client: Uploader, name: str) -> str:
        (root / "data" / name).write_text(name)
        record = open_record(root, RunDescription(kind="stage", name=name, stage_key=name))
        record.finish(RunResult(status="FINISHED", artifacts=[f"data/{name}"]))
        client.sync()
        return str(record.mlflow_run_id)

    old = send(toy, uploader, "old")
    chosen = f"file://{tmp_path}/chosen"
    uploader.client.create_experiment("elsewhere", artifact_location=chosen)
    copy = shutil.copytree(toy, tmp_path / "a copy%_", symlinks=True)
    copied = Uploader(copy)
    new = send(copy, copied, "new")
    shutil.rmtree(toy)
    for run_id, name in ((old, "old"), (new, "new")):
        place = copied.client.get_run(run_id).info.artifact_uri
        assert place.startswith((copy / "runs" / "services" / "artifacts").as_uri())
        assert [item.path for item in copied.client.list_artifacts(run_id)] == [name]
    elsewhere = copied.client.get_experiment_by_name("elsewhere")
    assert elsewhere is not None
    assert elsewhere.artifact_location == chosen


def test_a_bad_file_of_one_record_holds_up_no_other_and_is_named(
    toy: Path, give_store: Callable[[Path], None], typed: Typed
) -> None:
    give_store(toy)
    faults = {
        "picture": lambda folder: (folder / "step-00000007.png").write_text("x"),
        "line": lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"),
        "value": lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "a": "x"}\n'),
        "null": lambda folder: (folder / "metrics.jsonl").write_text('{"step": null, "a": 1}\n'),
        "promotion": lambda _: None,
    }
    records = {}
    for name in (*faults, "good"):
        folder = toy / "runs" / name
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "step-00000009.png")
        faults.get(name, lambda _: None)(folder)
        records[name] = open_record(
            toy,
            RunDescription(
                kind="stage",
                name=name,
                metrics_file=f"runs/{name}/metrics.jsonl",
                images_dir=f"runs/{name}",
            ),
        )
        promotions = [{"model": "of no weights"}] if name == "promotion" else []
        records[name].finish(RunResult(status="FINISHED", promotions=promotions))
    done = typed(toy, "sync")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert [next(n for n in records if f" {n}-" in line) for line in lines[:-1]] == list(faults)
    assert "step-00000007.png: no picture" in lines[0]
    assert "runs/line/metrics.jsonl: a line that is no object with a step: b'[1]" in lines[1]
    assert "result.json: path: Field required" in lines[4]
    assert lines[-1].startswith("error: 5 records ")
    uploader = Uploader(toy)
    statuses = {
        name: uploader.client.get_run(str(record.mlflow_run_id)).info.status
        for name, record in records.items()
    }
    assert statuses == dict.fromkeys(faults, "RUNNING") | {"good": "FINISHED"}
    # Other pictures of that record are there; beside a run, the uploader blames no server either.
    assert list(read_json(records["picture"].folder / "mlflow.json")["images"]) == [
        "step-00000009.png"
    ]
    beside = subprocess.run(
        [sys.executable, "-m", "flows.tracking.uploader", str(toy)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert beside.returncode == 1
    assert sorted(beside.stderr.splitlines()) == sorted(
        line.replace("error:", "tracking:", 1) for line in lines[:-1]
    )
    for name, file in (("picture", "step-00000007.png"), *((n, "metrics.jsonl") for n in faults)):
        (toy / "runs" / name / file).unlink(missing_ok=True)
    records["promotion"].finish(RunResult(status="FINISHED"))
    # What was noted as a request is asked again until it is answered.
    (records["value"].folder / "mlflow.json").unlink()
    assert typed(toy, "sync").stdout == "MLflow has everything\n"


def test_a_damaged_store_is_one_line_and_what_it_says_to_do_sends_everything_again(
    toy: Path, give_store: Callable[[Path], None]
) -> None:
    record = open_record(toy, RunDescription(kind="stage", name="vae", stage_key="k"))
    record.finish(RunResult(status="FINISHED", ended_ms=5))
    sent = {"store": "1@1", "run_id": "of the damaged store", "ended_ms": 5}
    write_json(record.folder / "mlflow.json", sent)
    store = toy / "runs" / "services" / "mlflow.db"
    store.parent.mkdir(parents=True)
    store.write_bytes(b"not a database" * 1000)
    with pytest.raises(DamagedStore, match=r"mlflow\.db is damaged .*ultraflux sync") as found:
        sync_now(toy)
    assert refusal(found.value, ["sync"]) == (str(found.value), FAILED)
    store.rename(store.with_name("aside.db"))
    (record.folder / "mlflow.json").unlink()
    give_store(toy)
    sync_now(toy)
    assert Uploader(toy).client.get_run(str(record.mlflow_run_id)).info.status == "FINISHED"
    # Damage that only a later question meets comes in MLflow's words.
    with pytest.raises(DamagedStore, match=r"mlflow\.db is damaged"):
        refuse_damaged(
            tracking_uri(toy), ValueError("(sqlite3) database disk image is malformed [SQL]")
        )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://[bad", "MLFLOW_TRACKING_URI is no address"),
        ("postgresql://u:secret@127.0.0.1:x/x", "MLFLOW_TRACKING_URI is no address"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/x", "MLflow at postgresql+psycopg://127.0.0.1"),
        pytest.param(
            "mysql+nosuch://127.0.0.1:1/x",
            "MLflow at mysql+nosuch://127.0.0.1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_store_that_cannot_be_asked_is_one_line_soon(
    toy: Path, address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    done = subprocess.run(
        ["ultraflux", "sync"], cwd=toy, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: {said}")
    assert "secret" not in done.stderr


def test_a_store_that_another_program_holds_is_one_line(
    toy: Path, give_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_store(toy)
    store = toy / "runs" / "services" / "mlflow.db"
    monkeypatch.setattr(artifact_places, "_PATIENCE_S", 0.2)
    with closing(sqlite3.connect(store)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingAway, match=r"mlflow\.db is locked by another") as found:
            sync_now(toy)
        assert refusal(found.value, []) == (str(found.value), FAILED)
        with pytest.raises(TrackingAway, match=r"mlflow\.db is locked by another"):
            servers.up(toy, prefect_port=servers.free_port(), mlflow_port=servers.free_port())
    assert servers.known_services(toy) == []
    sync_now(toy)
    # A lock that only a later question meets comes in MLflow's words.
    with pytest.raises(TrackingAway, match=r"mlflow\.db is locked"):
        refuse_damaged(tracking_uri(toy), ValueError("(sqlite3) database is locked [SQL]"))
