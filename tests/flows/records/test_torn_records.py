"""A record that a power cut tore is an interrupted run's: nothing fails for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.history.run_history import run_history
from flows.records.owners import close_ownerless, own_record
from flows.records.records import (
    Record,
    RunDescription,
    RunResult,
    all_records,
    latest_finished,
    open_record,
    records_dir,
    unsent_records,
)


@pytest.fixture
def ended(tmp_path: Path) -> Record:
    """A finished record beside the one that is torn."""
    record = open_record(tmp_path, RunDescription(kind="stage", name="select", stage_key="s"))
    record.finish(RunResult(status="FINISHED"))
    return record


@pytest.mark.parametrize("torn", ["", '{"status": "FIN', "\0\0\0\0", "\udc80"])
@pytest.mark.parametrize("name", ["run.json", "result.json", "mlflow.json", "owner.json"])
def test_a_torn_file_counts_as_missing_and_is_named_once(
    tmp_path: Path, ended: Record, torn: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    described = RunDescription(kind="stage", name="vae", stage_key="k")
    record = open_record(tmp_path, described)
    own_record(tmp_path, record.record_id)
    record.finish(RunResult(status="FINISHED"))
    (record.folder / name).write_bytes(torn.encode(errors="surrogateescape"))
    known = {one.record_id for one in all_records(tmp_path)}
    assert known == {ended.record_id} | ({record.record_id} if name != "run.json" else set())
    assert len(list(run_history(tmp_path))) == len(known)
    assert close_ownerless(tmp_path) == []
    assert record.mlflow_run_id is None
    assert latest_finished(tmp_path, "select") == ended
    assert len(unsent_records(tmp_path)) == (1 if name in {"run.json", "result.json"} else 2)
    again = open_record(tmp_path, described)
    assert (again == record) is (name == "result.json")
    said = capsys.readouterr().err.splitlines()
    assert [str(record.folder / name) in line for line in said] == (
        [] if name == "owner.json" else [True]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "stage"}', "name: Field required"),
        ('{"kind": "stage", "name": "vae", "started_ms": "soon"}', "started_ms: Input should be"),
        ('"text"', "Input should be a dictionary"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_record_of_another_shape_costs_itself_alone(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = open_record(tmp_path, RunDescription(kind="stage", name="vae"))
    other = records_dir(tmp_path) / "other"
    other.mkdir()
    (other / "run.json").write_text(text)
    assert [record.record_id for record in all_records(tmp_path)] == [good.record_id]
    assert f"{other / 'run.json'}" in (error := capsys.readouterr().err)
    assert said in error


def test_a_record_of_newer_code_is_read_without_what_this_code_does_not_know(
    tmp_path: Path,
) -> None:
    record = open_record(tmp_path, RunDescription(kind="stage", name="vae", started_ms=5))
    record.finish(RunResult(status="FINISHED", ended_ms=6))
    for name in ("run.json", "result.json"):
        file = record.folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": 1, "version": 2}))
    (found,) = all_records(tmp_path)
    result = found.result
    assert result is not None
    assert (found.run.name, found.run.started_ms, result.status) == ("vae", 5, "FINISHED")
