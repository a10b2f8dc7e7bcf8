"""A run that goes on under other settings: its past untouched, the new settings in force."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.telemetry.metric_log import MetricLog
from components.training.distributed.run_states import (
    RunIdentity,
    Segment,
    begin_state,
    continue_from,
    read_state,
)
from components.training.dit.batch_plan import PlanMismatch
from components.training.dit.curves import write_outcome
from components.training.dit.job import DitJob, StartUnusable
from components.training.dit.trainer import DitTrainer
from components.training.dit.worker import run_job

pytestmark = pytest.mark.usefixtures("training_environment_restored")

STEPS = 2


def identity(name: str) -> RunIdentity:
    return RunIdentity(stage="dit_stage1", settings={}, weights={}, data={}, code=name)


def gone_on(make_dit_job: Any, folder: Path, name: str, **changes: Any) -> DitJob:
    """One more step after two, in a state of its own, under changed settings."""
    state = read_state(folder / "first" / "state")
    assert state is not None
    target = folder / name
    target.mkdir()
    made = continue_from(state, target / "state", identity(name), 1)
    job = make_dit_job(target, **{"zero_stage": 1, "steps": STEPS + 1} | changes)
    job = job.model_copy(update={"segments": made.segments})
    run_job(job)
    return job


@pytest.fixture
def first(make_dit_job: Any, tmp_path: Path) -> Path:
    """A state with a checkpoint after two steps."""
    job = make_dit_job(tmp_path / "first", steps=STEPS, zero_stage=1)
    begin_state(job.state_dir, identity("first"), 1)
    run_job(job)
    return tmp_path


def raw(job: DitJob) -> dict[str, torch.Tensor]:
    return load_file(job.export_dir / "raw" / "diffusion_pytorch_model.safetensors")


def test_weight_decay_and_clipping_are_those_of_the_segment(make_dit_job, first) -> None:
    """AdamW decays apart from the gradient: w' = w'(0) - rate * decay * w, entry by entry."""
    before = load_file(first / "first" / "export" / "raw" / "diffusion_pytorch_model.safetensors")
    rate, decay = 2e-3, 0.5
    plain = raw(gone_on(make_dit_job, first, "plain", weight_decay=0.0, learning_rate=rate))
    decayed = raw(gone_on(make_dit_job, first, "decayed", weight_decay=decay, learning_rate=rate))
    for name, weights in plain.items():
        expected = weights - rate * decay * before[name]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-6)
    clipped = raw(gone_on(make_dit_job, first, "clipped", weight_decay=0.0, max_grad_norm=1e-4))
    assert any(not torch.equal(clipped[name], weights) for name, weights in plain.items())


def test_a_segment_that_changes_nothing_is_the_undisturbed_run(make_dit_job, first) -> None:
    whole = make_dit_job(first / "whole", steps=STEPS + 1, zero_stage=1)
    run_job(whole)
    parts = gone_on(make_dit_job, first, "same")
    for name, weights in raw(whole).items():
        assert torch.equal(weights, raw(parts)[name])
    first_checkpoint = first / "first" / "state" / "checkpoints" / "step-00000002"
    there = first / "same" / "state" / "checkpoints" / "step-00000002"
    # Retention may have dropped the link; where it is, it is the same file.
    if there.exists():
        assert os.path.samefile(first_checkpoint / "trainer.json", there / "trainer.json")


def test_other_data_is_gone_on_with_only_where_a_segment_says_so(make_dit_job, first) -> None:
    job = gone_on(make_dit_job, first, "batches", global_batch_size=2)
    card = (job.export_dir / "raw" / "README.md").read_text(encoding="utf-8")
    assert "| 1 to 2 | as begun |" in card
    assert "| 3 to 3 | code |" in card
    # A later checkpoint follows the new plan, and is checked against it again.
    other = job.settings.model_copy(update={"global_batch_size": 4, "steps": 5})
    with pytest.raises(PlanMismatch):
        run_job(job.model_copy(update={"settings": other}))
    # A segment that began at another step says nothing about this checkpoint.
    begun = Segment(from_step=0, key="a", changes={})
    state = make_dit_job(first / "first", steps=3, zero_stage=1, global_batch_size=2)
    segments = (begun, Segment(from_step=1, key="b", changes={}))
    with pytest.raises(PlanMismatch):
        run_job(state.model_copy(update={"segments": segments}))


def test_a_run_may_end_at_the_checkpoint_that_it_goes_on_from(make_dit_job, tmp_path) -> None:
    """Stop here and export what there is, at a step that was not measured when it was taken."""
    rare = {"zero_stage": 1, "validate_every": 9}
    first = make_dit_job(tmp_path / "first", steps=4, **rare)
    begin_state(first.state_dir, identity("first"), 1)
    first = first.model_copy(update={"metrics": first.state_dir / "metrics.jsonl"})
    run_job(first)
    shutil.rmtree(first.state_dir / "checkpoints" / "step-00000004")
    state = read_state(first.state_dir)
    assert state is not None
    folder = tmp_path / "cut"
    folder.mkdir()
    made = continue_from(state, folder / "state", identity("cut"), 1)
    cut = make_dit_job(folder, steps=2, **rare)
    log = cut.state_dir / "metrics.jsonl"
    cut = cut.model_copy(update={"segments": made.segments, "metrics": log})
    run_job(cut)
    whole = make_dit_job(tmp_path / "whole", steps=2, **rare)
    run_job(whole)
    for name, tensor in raw(whole).items():
        assert torch.equal(tensor, raw(cut)[name])
    expected = write_outcome(whole)
    assert write_outcome(cut).metrics == expected.metrics
    # Killed in its export and started again it measures nothing twice.
    rows = list(MetricLog(log).rows())
    run_job(cut)
    assert list(MetricLog(log).rows()) == rows


@pytest.mark.slow
def test_weights_to_start_from_that_were_replaced_are_not_taken_for_those_begun_with(
    make_dit_job, first, monkeypatch
) -> None:
    start = shutil.copytree(first / "first" / "export" / "ema", first / "start")
    changes = {"initial_weights": start}
    job = make_dit_job(first / "next", steps=1, zero_stage=1).model_copy(update=changes)
    file = start / "diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    run = DitTrainer.run

    def replaced(trainer: DitTrainer) -> None:
        run(trainer)
        tensors = {name: value + 1 for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(DitTrainer, "run", replaced)
    # While the steps ran, and by whoever starts it again.
    for _ in range(2):
        with pytest.raises(StartUnusable, match=r"start .* are not those that this run began with"):
            run_job(job)
        assert not (job.export_dir / "raw").exists()
    file.write_bytes(original)
    monkeypatch.undo()
    run_job(job)
    assert (job.export_dir / "raw").exists()
