"""Training with the second backbone: resumes to the same bytes, loads in stock diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from components.models.backbones import BACKBONES
from components.models.sd3.settings import Sd3Settings, TinySd3Transformer
from components.telemetry.metric_log import MetricLog
from components.training.dit.job import DitJob
from components.training.dit.worker import run_job

TINY = TinySd3Transformer(
    num_layers=1,
    num_attention_heads=4,
    attention_head_dim=24,
    sample_size=8,
    pos_embed_max_size=9,
)


def as_sd3(job: DitJob, pos_embed_max_size: int | None = None) -> DitJob:
    sd3 = Sd3Settings(pos_embed_max_size=pos_embed_max_size, tiny=TINY)
    changes = {"backbone": "sd3", "sd3": sd3}
    return job.model_copy(update={"transformer": job.transformer.model_copy(update=changes)})


def exported(job: DitJob) -> dict[str, bytes]:
    files = [file for file in sorted(job.export_dir.rglob("*")) if file.is_file()]
    return {str(file.relative_to(job.export_dir)): file.read_bytes() for file in files}


@pytest.mark.usefixtures("training_environment_restored")
def test_sd3_learns_resumes_to_the_same_bytes_and_is_loaded_by_stock_diffusers(
    make_dit_job, tmp_path, capsys
):
    options = {"steps": 30, "validate_every": 30, "checkpoint_every": 20, "learning_rate": 2e-3}
    whole = as_sd3(make_dit_job(tmp_path / "whole", **options))
    run_job(whole)
    # Its guidance contrasts with a prompt that was never trained on.
    assert "dit_stage1: sd3 is sampled against the empty prompt" in capsys.readouterr().err
    losses = [
        row["validation_loss"]
        for row in MetricLog(whole.metrics).rows()
        if "validation_loss" in row
    ]
    assert losses[-1] < 0.97 * losses[0]

    run_job(as_sd3(make_dit_job(tmp_path / "parts", **options | {"steps": 20})))
    parts = as_sd3(make_dit_job(tmp_path / "parts", **options))
    run_job(parts)
    assert exported(parts) == exported(whole)

    fresh = BACKBONES["sd3"].build_tiny(whole.transformer, (16, 16), 16, whole.seed)
    for name in ("raw", "ema"):
        folder = whole.export_dir / name
        stock = SD3Transformer2DModel.from_pretrained(folder, local_files_only=True)
        # The engine computes in bfloat16; the table of positions must not come out rounded.
        assert torch.equal(stock.pos_embed.pos_embed, fresh.pos_embed.pos_embed)
        assert not torch.equal(stock.proj_out.weight, fresh.proj_out.weight)
        assert str(tmp_path) not in (folder / "config.json").read_text()

    # The second stage starts at the first one's loss; a larger table is carried along.
    options |= {"steps": 1, "precision": "fp32", "caption_dropout": 0.5}
    second = as_sd3(make_dit_job(tmp_path / "second", **options), pos_embed_max_size=11)
    second = second.model_copy(update={"initial_weights": whole.export_dir / "ema"})
    capsys.readouterr()
    run_job(second)
    assert "empty prompt" not in capsys.readouterr().err
    card = (second.export_dir / "ema" / "README.md").read_text()
    assert "The empty prompt replaced 0.5 of the captions." in card
    rows = list(MetricLog(whole.metrics).rows())
    ended = next(row["validation_loss_ema"] for row in rows if "validation_loss_ema" in row)
    start = next(iter(MetricLog(second.metrics).rows()))
    assert start["validation_loss"] == pytest.approx(ended, rel=0.02)
    stock = SD3Transformer2DModel.from_pretrained(second.export_dir / "raw", local_files_only=True)
    assert stock.config.pos_embed_max_size == 11


@pytest.mark.usefixtures("training_environment_restored")
def test_images_beyond_the_position_table_stop_a_run_before_its_first_step(make_dit_job, tmp_path):
    job = as_sd3(make_dit_job(tmp_path))
    tiny = TINY.model_copy(update={"pos_embed_max_size": 5})
    sd3 = job.transformer.own("sd3", Sd3Settings).model_copy(update={"tiny": tiny})
    job = job.model_copy(update={"transformer": job.transformer.model_copy(update={"sd3": sd3})})
    with pytest.raises(ValueError, match="6x12 need 6 patches along an edge, SD3's table"):
        run_job(job)
    assert not job.export_dir.exists()


def test_a_job_keeps_the_backbones_own_settings_on_its_way_to_the_ranks(make_dit_job, tmp_path):
    job = as_sd3(make_dit_job(tmp_path), pos_embed_max_size=12)
    arrived = DitJob.model_validate_json(job.model_dump_json())
    assert arrived == job
    assert arrived.transformer.own("sd3", Sd3Settings).pos_embed_max_size == 12
