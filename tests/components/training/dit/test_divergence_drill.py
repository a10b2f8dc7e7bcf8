"""A bad record in the store: the run stops, leaves it out or goes back, alike in every replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.distributed.divergence import TrainingDiverged, read_events
from components.training.dit.batch_plan import BatchPlan
from components.training.dit.job import DitJob
from components.training.dit.worker import run_job
from components.training.stores.latent_store import LatentStoreWriter
from components.training.stores.text_store import build_text_store, embedded_prompts

pytestmark = pytest.mark.usefixtures("training_environment_restored")

SPIKE = 8
"""Step, from 0, whose batch holds the bad record; with one epoch no other step does."""
IMAGES, BATCH = 28, 2
Store = Callable[..., Path]


def image(number: int) -> str:
    return f"image{number:02d}"


def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(prompts[0]))
    return (
        torch.randn(len(prompts), 8, 16, generator=generator),
        torch.randn(len(prompts), 16, generator=generator),
    )


@pytest.fixture
def store(make_dit_job: Any, tmp_path: Path) -> Store:
    """Makes a corpus whose record of one image is multiplied by a number, that of the step after
    by another one."""

    def make(factor: float, then: float = 1.0) -> Path:
        root = tmp_path / f"corpus{factor}"
        seed = make_dit_job(tmp_path).seed
        plan = BatchPlan({image(n): "128x128" for n in range(2, IMAGES)}, BATCH, seed)
        bad = {plan.batch(SPIKE).sample_ids[0]: factor, plan.batch(SPIKE + 1).sample_ids[0]: then}
        writer = LatentStoreWriter(
            root / "writing", dtype="float32", shard_mb=1, encoder_digest="synthetic"
        )
        generator = torch.Generator().manual_seed(0)
        captions = {}
        for number in range(IMAGES):
            latent = torch.randn(1, 16, 8, 8, generator=generator)
            split = "eval" if number < 2 else "train"
            name = image(number)
            writer.append((128, 128), [(name, split)], latent * bad.get(name, 1.0))
            captions[name] = f"caption {number}"
        writer.publish(root / "latents")
        build_text_store(
            root / "embedding",
            root / "texts",
            captions,
            lambda plan: (embedded_prompts(prompts, embed, "float32") for prompts in plan),
            encoder_digest="synthetic",
            dtype="float32",
        )
        return root

    return make


def job_on(make_dit_job: Any, corpus: Path, folder: Path, **changes: Any) -> DitJob:
    divergence = {
        "warmup_steps": 4,
        "sigmas": 6.0,
        "rollback_every": 4,
        "rollback_margin": 3,
        "left_out_steps": 1,
    } | changes.pop("divergence", {})
    small = {
        "steps": 12,
        "global_batch_size": BATCH,
        "micro_batch_size": 1,
        "validate_every": 100,
        "checkpoint_every": 3,
        "keep_checkpoints": 1,
        "divergence": divergence,
    }
    job = make_dit_job(folder, **(small | changes))
    return job.model_copy(update={"latents": corpus / "latents", "texts": corpus / "texts"})


def weights(job: DitJob, name: str = "raw") -> dict[str, torch.Tensor]:
    return load_file(job.export_dir / name / "diffusion_pytorch_model.safetensors")


def same(one: DitJob, other: DitJob) -> bool:
    pairs = [(weights(one, name), weights(other, name)) for name in ("raw", "ema")]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def losses(job: DitJob) -> list[int]:
    return [int(row["step"]) for row in MetricLog(job.metrics).rows() if "loss" in row]


def test_a_skipped_step_changes_nothing_and_a_replay_skips_it_too(make_dit_job, tmp_path, store):
    corpus = store(1e3)

    def job(name: str, steps: int) -> DitJob:
        return job_on(make_dit_job, corpus, tmp_path / name, steps=steps, on_divergence="skip")

    before, skipped = job("before", SPIKE), job("skipped", SPIKE + 1)
    run_job(before)
    run_job(skipped)
    # Neither weights nor average, though the learning rate is not zero.
    assert same(before, skipped)
    (event,) = read_events(skipped.state_dir)
    assert (event.step, event.action, event.left_out) == (SPIKE, "skip", (SPIKE, SPIKE))
    assert event.reason.startswith(("loss ", "gradient norm "))
    batches = skipped.state_dir / "diverged" / f"step-{SPIKE + 1:08d}"
    saved = [load_file(file)["latents"].abs().max() for file in sorted(batches.iterdir())]
    assert len(saved) == BATCH
    assert max(saved) > 100

    # On from before the event, against a run that nothing disturbed.
    whole, parts = job("whole", 12), job("before", 12)
    run_job(whole)
    assert not same(before, whole)
    run_job(parts)
    assert same(parts, whole)
    assert read_events(parts.state_dir) == (event,)
    assert losses(parts) == losses(whole)
    assert losses(whole) == [step for step in range(1, 13) if step != SPIKE + 1]
    card = (whole.export_dir / "raw" / "README.md").read_text(encoding="utf-8")
    assert (
        f"## Left out\n\nUpdates that the guard against divergence refused:\n\n- {event}\n" in card
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_rollback_without_further_batches_ends_as_a_skip(
    make_dit_job, tmp_path, store, zero_stage
):
    """The same updates in the same order, some of them made twice."""
    corpus = store(1e3)
    engine = {"zero_stage": zero_stage, "precision": "bf16" if zero_stage else "fp32"}

    def job(name: str, steps: int = 12, **changes: Any) -> DitJob:
        return job_on(make_dit_job, corpus, tmp_path / name, steps=steps, **engine, **changes)

    skipped, back = job("skip", on_divergence="skip"), job("back", on_divergence="rollback")
    run_job(skipped)
    run_job(back)
    assert same(back, skipped)
    (event,) = read_events(back.state_dir)
    assert (event.action, event.back_to, event.left_out) == ("rollback", 4, (SPIKE, SPIKE))
    assert losses(back) == losses(skipped)
    # Stopped before the event and after it; checkpoints at other steps change nothing.
    options = {"on_divergence": "rollback", "checkpoint_every": 1}
    for until in (SPIKE - 1, SPIKE + 2, 12):
        parts = job("parts", until, **options)
        run_job(parts)
    assert same(parts, back)
    assert read_events(parts.state_dir) == (event,)


@pytest.mark.slow
def test_a_rollback_leaves_out_the_batches_up_to_the_spike(make_dit_job, tmp_path, store):
    """After it the weights are those of the last step that is trained on."""
    corpus = store(1e3)
    options = {"on_divergence": "rollback", "divergence": {"left_out_steps": 3}}
    back = job_on(make_dit_job, corpus, tmp_path / "back", steps=SPIKE + 1, **options)
    before = job_on(make_dit_job, corpus, tmp_path / "before", steps=SPIKE - 2)
    run_job(back)
    run_job(before)
    assert same(back, before)
    assert losses(back) == list(range(1, SPIKE - 1))


@pytest.mark.parametrize(
    "zero_stage",
    [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))],
)
def test_a_loss_that_is_not_finite_is_skipped_in_every_zero_stage(
    make_dit_job, tmp_path, store, zero_stage
):
    # The store takes finite numbers only; the square of this one is none.
    corpus = store(1e30)
    options = {"zero_stage": zero_stage, "precision": "bf16" if zero_stage else "fp32"}
    before = job_on(make_dit_job, corpus, tmp_path / "before", steps=SPIKE, **options)
    run_job(before)
    skipped = job_on(
        make_dit_job, corpus, tmp_path / "on", steps=SPIKE + 1, on_divergence="skip", **options
    )
    run_job(skipped)
    assert same(before, skipped)
    assert [event.reason for event in read_events(skipped.state_dir)] == ["loss is not finite"]


def test_events_are_bounded_and_a_stop_names_the_way_on(make_dit_job, tmp_path, store):
    corpus = store(1e3)
    options = {"on_divergence": "skip", "divergence": {"max_events": 0}}
    job = job_on(make_dit_job, corpus, tmp_path / "job", **options)
    said = rf"at step {SPIKE + 1}; .*checkpoint of step 6 is whole.*on_divergence.*--continue-from"
    with pytest.raises(TrainingDiverged, match=said):
        run_job(job)
    assert newest_checkpoint(job.state_dir / "checkpoints") is not None
    assert not job.export_dir.exists()
    # The settings that the message names, on the state that it names.
    onward = job_on(make_dit_job, corpus, tmp_path / "job", on_divergence="skip")
    run_job(onward)
    assert losses(onward)[-1] == 12


@pytest.mark.slow
def test_a_checkpoint_made_after_the_loss_rose_is_not_gone_on_from(make_dit_job, tmp_path, store):
    """A step above half of `sigmas`, saved like every other, and after it one without a number."""
    options = {
        "precision": "fp32",
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "divergence": {"sigmas": 25.0},
    }
    job = job_on(make_dit_job, store(1e3, then=1e30), tmp_path, **options)
    said = rf"loss is not finite at step {SPIKE + 2}; .*the checkpoint of step {SPIKE} is whole"
    with pytest.raises(TrainingDiverged, match=said):
        run_job(job)
    # The step that rose was trained on, and its checkpoint is gone.
    assert losses(job)[-1] == SPIKE + 1
    newest = newest_checkpoint(job.state_dir / "checkpoints")
    assert newest is not None
    assert newest[0] == SPIKE
