"""Which run made a result."""

from __future__ import annotations

from pathlib import Path

from flows.records.records import RunDescription, maker_of, open_record


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
