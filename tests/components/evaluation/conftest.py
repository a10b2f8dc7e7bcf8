"""A tiny saved pipeline for tests of systems under test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved FluxPipeline of the true classes, tiny and random."""
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
