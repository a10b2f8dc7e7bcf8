from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from components.models.transformer import UltraFluxTransformer2DModel
from components.telemetry.metric_log import MetricLog
from components.training.distributed.divergence import TrainingDiverged
from components.training.distributed.optimizers import learning_rate
from components.training.distributed.ranks import Ranks
from components.training.dit.batch_plan import PlanMismatch
from components.training.dit.curves import (
    draw_curves,
    headline_metrics,
    history_table,
    validation_table,
)
from components.training.dit.job import DitJob, StartUnusable, build_transformer
from components.training.dit.throughput import MACHINE_METRICS
from components.training.dit.validation import ValidationSet, band_losses
from components.training.dit.worker import run_job
from components.training.sharded.engine import engine_configuration
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

pytestmark = pytest.mark.usefixtures("training_environment_restored")


def exported(job: DitJob) -> dict[str, bytes]:
    files = sorted(job.export_dir.rglob("*"))
    return {str(f.relative_to(job.export_dir)): f.read_bytes() for f in files if f.is_file()}


def lasting(job: DitJob) -> list[dict[str, float]]:
    """Logged metrics without durations."""
    return [
        {k: v for k, v in row.items() if k not in MACHINE_METRICS}
        for row in MetricLog(job.metrics).rows()
    ]


def test_a_run_stopped_after_a_checkpoint_ends_with_the_same_bytes(make_dit_job, tmp_path):
    whole = make_dit_job(tmp_path / "whole")
    run_job(whole)
    run_job(make_dit_job(tmp_path / "parts", steps=2))
    parts = make_dit_job(tmp_path / "parts")
    run_job(parts)
    assert exported(parts) == exported(whole)
    assert set(exported(whole)) == {
        f"{name}/{file}"
        for name in ("raw", "ema")
        for file in (
            "README.md",
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "movement.json",
            "weights.sha256",
        )
    }
    # The short run measured its EMA at its own end; everything else is the same.
    rows = [row for row in lasting(parts) if row["step"] != 2 or "validation_loss_ema" not in row]
    assert rows == lasting(whole)

    again = exported(whole)
    run_job(whole)
    assert exported(whole) == again

    for name in ("raw", "ema"):
        model = UltraFluxTransformer2DModel.from_pretrained(whole.export_dir / name)
        assert model.dtype == torch.float32
        config = json.loads((whole.export_dir / name / "config.json").read_text())
        assert "_name_or_path" not in config
    rows = list(MetricLog(whole.metrics).rows())
    assert list(history_table(rows)["step"]) == [1, 2, 3, 4]
    table = validation_table(rows)
    assert table.groupby(["step", "weights"]).size().to_dict() == {
        (0, "raw"): 8,
        (2, "raw"): 8,
        (4, "raw"): 8,
        (4, "ema"): 8,
    }
    numbers = headline_metrics(rows, (0.541, 1.0))
    assert numbers["validation_loss_drop"] == pytest.approx(
        1 - numbers["validation_loss_last"] / numbers["validation_loss_first"]
    )
    draw_curves(rows, "dit_stage1", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"

    with pytest.raises(PlanMismatch, match="another set of samples"):
        run_job(make_dit_job(tmp_path / "whole", global_batch_size=2))


def test_training_from_exported_weights_starts_at_their_loss(make_dit_job, tmp_path):
    first = make_dit_job(tmp_path / "first", precision="fp32")
    run_job(first)
    job = make_dit_job(tmp_path / "second", precision="fp32", steps=1)
    job = job.model_copy(update={"initial_weights": first.export_dir / "ema"})
    run_job(job)
    last = [row for row in lasting(first) if "validation_loss_ema" in row][-1]
    start = lasting(job)[0]
    assert start["validation_loss"] == pytest.approx(last["validation_loss_ema"], rel=1e-6)
    config = (job.export_dir / "raw" / "config.json").read_text()
    assert str(tmp_path) not in config


def test_training_images_are_measured_like_held_out_ones_and_change_no_weight(
    make_dit_job, tmp_path
):
    options = {"precision": "fp32", "steps": 1, "validation_repeats": 2}
    plain = make_dit_job(tmp_path / "plain", validation_training_images=0, **options)
    run_job(plain)
    job = make_dit_job(tmp_path / "measured", validation_training_images=2, **options)
    run_job(job)
    weights = "ema/diffusion_pytorch_model.safetensors"
    assert exported(job)[weights] == exported(plain)[weights]
    store = LatentStore(job.latents)
    train = sorted(store.index.loc[store.index["split"] == "train", "image_id"])
    # By the image, one at a time: the mean over images is the mean of theirs.
    by_hand = ValidationSet(
        store, TextStore(job.texts), train[:2], repeats=2, batch_size=1, seed=job.seed
    ).evaluate(
        build_transformer(
            job, TextStore(job.texts).widths, int(store.index["latent_channels"].iloc[0])
        ),
        job.objective,
        job.settings.guidance_scale,
        torch.float32,
        Ranks(0, 1, torch.device("cpu")),
    )
    first, last = lasting(job)[0], lasting(job)[-1]
    assert first["training_images_loss"] == pytest.approx(by_hand.mean, rel=1e-6)
    numbers = headline_metrics(list(MetricLog(job.metrics).rows()), (0.0, 1.0))
    # The averaged weights speak last: they are the ones that paint.
    assert numbers["training_images_loss_last"] == last["training_images_loss_ema"]
    assert numbers["training_images_loss_drop"] == pytest.approx(
        1 - last["training_images_loss_ema"] / first["training_images_loss"]
    )
    assert not any(name.startswith("training_images") for name in lasting(plain)[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    make_dit_job, tmp_path, monkeypatch
):
    original = LatentStore.read_stored

    def poisoned(self, image_ids, **options):
        latents = original(self, image_ids, **options)
        is_training = int(image_ids[0][-2:]) >= 2
        return latents * float("nan") if is_training else latents

    monkeypatch.setattr(LatentStore, "read_stored", poisoned)
    job = make_dit_job(tmp_path)
    with pytest.raises(TrainingDiverged, match="at step 1; "):
        run_job(job)
    saved = sorted((job.state_dir / "diverged" / "step-00000001").iterdir())
    assert [file.name for file in saved] == ["rank0-micro0.safetensors", "rank0-micro1.safetensors"]
    assert set(load_file(saved[0])) == {"latents", "noise", "t", "text", "pooled"}
    assert not job.export_dir.exists()


def test_learning_rate_warms_up_then_stays_or_falls_to_zero(make_dit_job, tmp_path):
    constant = make_dit_job(tmp_path, steps=100, warmup_steps=10, learning_rate=1.0).settings
    assert learning_rate(0, constant) == pytest.approx(0.1)
    assert learning_rate(9, constant) == learning_rate(99, constant) == 1.0
    cosine = constant.model_copy(update={"schedule": "cosine"})
    assert learning_rate(10, cosine) == 1.0
    assert learning_rate(55, cosine) == pytest.approx(0.5)
    assert learning_rate(100, cosine) == pytest.approx(0.0)


def test_band_losses_average_the_samples_of_each_noise_band():
    t = torch.tensor([0.01, 0.99, 1.0, 0.5])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert band_losses(t, losses) == {"loss_band_0": 1.0, "loss_band_4": 8.0, "loss_band_7": 3.0}


def test_batches_that_do_not_divide_are_refused_by_name(make_dit_job, tmp_path):
    settings = make_dit_job(tmp_path).settings
    assert engine_configuration(settings, 2, 100)["gradient_accumulation_steps"] == 1
    with pytest.raises(ValueError, match="global_batch_size 4"):
        engine_configuration(settings, 4, 100)


def test_loss_of_the_trainer_is_the_mean_over_the_global_batch(make_dit_job, tmp_path):
    job = make_dit_job(tmp_path, steps=1)
    run_job(job)
    row = next(row for row in lasting(job) if "loss" in row)
    bands = [value for name, value in row.items() if name.startswith("loss_band")]
    assert min(bands) <= row["loss"] <= max(bands)
    assert math.isfinite(row["grad_norm"])
    assert row["grad_norm"] > 0


def test_a_checkpoint_that_a_bit_was_changed_in_costs_steps_and_no_result(
    make_dit_job, tmp_path, capsys
):
    job = make_dit_job(tmp_path)
    run_job(job)
    expected = exported(job)
    newest = job.state_dir / "checkpoints" / "step-00000004"
    for name in ("engine/mp_rank_00_model_states.pt", "trainer.json"):
        path = newest / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        capsys.readouterr()
        run_job(job)
        said = f"{path}: damaged, it does not hold what was written; going on from step 2"
        assert said in capsys.readouterr().err
        assert exported(job) == expected
        newest = newest.with_name("step-00000004.1")


def test_processes_that_a_batch_does_not_divide_over_are_refused_before_any_starts(
    make_dit_job, tmp_path
):
    job = make_dit_job(tmp_path, processes=3)
    with pytest.raises(StartUnusable, match=r"^dit_stage1\.global_batch_size 4 .* 3 processes"):
        run_job(job)
    assert not (job.state_dir / "ranks").exists()
