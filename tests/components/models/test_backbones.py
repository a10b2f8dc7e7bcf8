from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from components.models.backbones import BACKBONES, backbone_of, check_stores
from components.models.tiny import build_tiny_sd3_transformer, build_tiny_transformer
from components.settings.models import Sd3Settings, TinySd3Transformer
from components.telemetry.metric_log import MetricLog
from components.training.dit.job import DitJob
from components.training.dit.velocity import NoisedBatch, predict_velocity
from components.training.dit.worker import run_job

TINY = TinySd3Transformer(
    num_layers=1,
    num_attention_heads=4,
    attention_head_dim=24,
    sample_size=8,
    pos_embed_max_size=9,
)


def small_sd3(**options):
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = build_tiny_sd3_transformer(**shape, pos_embed_max_size=8, **options)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=generator)
    return model


def make_batch(height: int, width: int) -> NoisedBatch:
    generator = torch.Generator().manual_seed(0)
    return NoisedBatch(
        sample_ids=("a", "b"),
        latents=torch.randn(2, 16, height, width, generator=generator),
        noise=torch.randn(2, 16, height, width, generator=generator),
        t=torch.tensor([0.25, 0.9]),
        text=torch.randn(2, 5, 64, generator=generator),
        pooled=torch.randn(2, 64, generator=generator),
    )


@pytest.mark.parametrize("size", [(16, 6), (4, 14)])
def test_sd3_velocity_equals_a_direct_call_of_diffusers_model(size):
    model, batch = small_sd3(), make_batch(*size)
    noised = (1 - batch.t)[:, None, None, None] * batch.latents
    noised = noised + batch.t[:, None, None, None] * batch.noise
    with torch.no_grad():
        expected = model(
            hidden_states=noised,
            encoder_hidden_states=batch.text,
            pooled_projections=batch.pooled,
            timestep=torch.tensor([250.0, 900.0]),
        ).sample
        velocity = predict_velocity(model, batch, 3.5, torch.float32)
        without = predict_velocity(model, batch, 1.0, torch.float32)
        rounded = predict_velocity(model.to(torch.bfloat16), batch, 1.0, torch.bfloat16)
    torch.testing.assert_close(velocity, expected)
    assert torch.equal(velocity, without)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, velocity, atol=0.1, rtol=0.1)


def test_the_configuration_tells_the_backbone_also_through_an_engine():
    class Engine(nn.Module):
        config = {}  # noqa: RUF012

        def __init__(self, module):
            super().__init__()
            self.module = module

    flux = build_tiny_transformer(num_layers=1, num_single_layers=1)
    assert backbone_of(Engine(flux)) is BACKBONES["flux"]
    assert backbone_of(Engine(small_sd3())) is BACKBONES["sd3"]
    foreign = nn.Linear(1, 1)
    foreign.config = {}
    with pytest.raises(ValueError, match=r"a Linear .* backbones flux, sd3"):
        backbone_of(foreign)


def test_stores_that_do_not_fit_the_transformer_are_named():
    model = small_sd3()
    check_stores(model, (64, 64), 16, [(16, 6), (2, 4)])
    with pytest.raises(ValueError, match="takes 16 latent channels, the latent store has 4"):
        check_stores(model, (64, 64), 4, [])
    with pytest.raises(ValueError, match=r"\(sd3\).* has 4096 and 64; use the text encoders"):
        check_stores(model, (4096, 64), 16, [])
    with pytest.raises(ValueError, match="18x4 need 9 patches"):
        check_stores(model, (64, 64), 16, [(2, 4), (18, 4)])
    with pytest.raises(ValueError, match="even edges"):
        check_stores(model, (64, 64), 16, [(3, 4)])
    flux = build_tiny_transformer(num_layers=1, num_single_layers=1)
    check_stores(flux, (64, 64), 16, [(200, 4)])
    with pytest.raises(ValueError, match=r"\(flux\): takes text states of width 64"):
        check_stores(flux, (64, 32), 16, [])


def as_sd3(job: DitJob, pos_embed_max_size: int | None = None) -> DitJob:
    sd3 = Sd3Settings(pos_embed_max_size=pos_embed_max_size, tiny=TINY)
    changes = {"backbone": "sd3", "sd3": sd3}
    return job.model_copy(update={"transformer": job.transformer.model_copy(update=changes)})


def exported(job: DitJob) -> dict[str, bytes]:
    files = [file for file in sorted(job.export_dir.rglob("*")) if file.is_file()]
    return {str(file.relative_to(job.export_dir)): file.read_bytes() for file in files}


@pytest.mark.usefixtures("training_environment_restored")
def test_sd3_learns_resumes_to_the_same_bytes_and_is_loaded_by_stock_diffusers(
    make_dit_job, tmp_path
):
    options = {"steps": 30, "validate_every": 30, "checkpoint_every": 20, "learning_rate": 2e-3}
    whole = as_sd3(make_dit_job(tmp_path / "whole", **options))
    run_job(whole)
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
    options |= {"steps": 1, "precision": "fp32"}
    second = as_sd3(make_dit_job(tmp_path / "second", **options), pos_embed_max_size=11)
    second = second.model_copy(update={"initial_weights": whole.export_dir / "ema"})
    run_job(second)
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
    sd3 = job.transformer.sd3.model_copy(update={"tiny": tiny})
    job = job.model_copy(update={"transformer": job.transformer.model_copy(update={"sd3": sd3})})
    with pytest.raises(ValueError, match="6x12 need 6 patches along an edge, SD3's table"):
        run_job(job)
    assert not job.export_dir.exists()


def test_a_folder_of_the_other_backbone_is_refused(make_dit_job, tmp_path):
    settings = as_sd3(make_dit_job(tmp_path)).transformer
    build_tiny_transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="UltraFluxTransformer2DModel, expected SD3"):
        BACKBONES["sd3"].load(tmp_path / "flux", settings)
    small_sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel, expected UltraFlux"):
        BACKBONES["flux"].load(tmp_path / "sd3", settings)
