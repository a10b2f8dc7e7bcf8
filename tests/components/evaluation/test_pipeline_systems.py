"""Saved diffusers pipelines of the true classes as systems under test, tiny and random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from components.evaluation.suites import SuiteItem
from components.evaluation.systems import PipelineSystem, Sampling

ITEMS = [SuiteItem("a", "a lake", 32, 48, 1), SuiteItem("b", "a hill", 48, 32, 2)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    from components.models.text_encoders import build_tiny_text_encoders

    folder = tmp_path_factory.mktemp("flux")
    captions = ["a lake", "a hill"]
    texts = build_tiny_text_encoders(folder / "texts", captions, t5_dim=32, clip_dim=24)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=texts.text_encoder,
        tokenizer=texts.tokenizer,
        text_encoder_2=texts.text_encoder_2,
        tokenizer_2=texts.tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_a_flux_pipeline_makes_each_picture_once_and_anew_for_other_settings(
    flux: Path, tmp_path: Path
) -> None:
    system = PipelineSystem("flux", flux, Sampling(num_inference_steps=2))
    paths = system.pictures(ITEMS, tmp_path)
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(48, 32), (32, 48)]
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    kept_at = paths[1].stat().st_mtime_ns
    assert system.pictures(ITEMS, tmp_path) == paths
    assert [path.read_bytes() for path in paths] == before
    assert paths[1].stat().st_mtime_ns == kept_at
    other = replace(system, sampling=Sampling(num_inference_steps=3))
    other.pictures(ITEMS[:1], tmp_path)
    assert paths[0].read_bytes() != before[0]
