"""Which run made a result."""

from __future__ import annotations

from pathlib import Path

from flows.records.records import (
    RunDescription,
    RunResult,
    Status,
    all_records,
    close_interrupted,
    latest_finished,
    maker_of,
    open_record,
)


def test_an_acceptance_is_not_taken_for_the_run_whose_outputs_it_lets_stand(tmp_path: Path) -> None:
    outputs = {"data/vae/metrics.json": "0" * 32}
    made = open_record(tmp_path, RunDescription(kind="stage", name="vae"))
    made.set_outputs(outputs)
    accepted = open_record(tmp_path, RunDescription(kind="acceptance", name="accept-vae"))
    accepted.set_outputs(outputs)
    found = maker_of(tmp_path, "vae", outputs)
    assert found is not None
    assert found.record_id == made.record_id
    assert maker_of(tmp_path, "vae", {}) is None
    assert maker_of(tmp_path, "vae", {"data/vae/metrics.json": "1" * 32}) is None


def test_the_newest_run_that_finished_is_not_one_that_failed_or_goes_on(tmp_path: Path) -> None:
    assert latest_finished(tmp_path, "vae") is None
    made = {}
    ends: list[Status | None] = ["FINISHED", "FINISHED", "FAILED", "KILLED", None]
    for number, status in enumerate(ends):
        described = RunDescription(kind="stage", name="vae", started_ms=number)
        made[number] = open_record(tmp_path, described)
        if status is not None:
            made[number].finish(RunResult(status=status))
    other = open_record(tmp_path, RunDescription(kind="stage", name="latents", started_ms=9))
    other.finish(RunResult(status="FINISHED"))
    assert latest_finished(tmp_path, "vae") == made[1]


def test_a_pipeline_closes_what_it_has_opened_and_nobody_elses(tmp_path: Path) -> None:
    for stage, parent in (("vae", "mine"), ("latents", "mine"), ("select", "other"), ("dit", None)):
        open_record(tmp_path, RunDescription(kind="stage", name=stage, parent=parent))
    ended = next(record for record in all_records(tmp_path) if record.run.name == "latents")
    ended.finish(RunResult(status="FINISHED"))
    close_interrupted(tmp_path, "mine")
    found = {one.run.name: one.result and one.result.status for one in all_records(tmp_path)}
    assert found == {"vae": "KILLED", "latents": "FINISHED", "select": None, "dit": None}
