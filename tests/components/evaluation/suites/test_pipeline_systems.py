"""Saved diffusers pipelines of the true classes as systems under test, tiny and random."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.evaluation.suites.suites import SuiteItem
from components.evaluation.suites.system import Sampling
from components.evaluation.suites.systems import PRESETS, PipelineSystem

ITEMS = [SuiteItem("a", "a lake", 32, 48, 1), SuiteItem("b", "a hill", 48, 32, 2)]


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


CAPTIONS = ["a lake", "a hill"]


def save_sd3(folder: Path, texts: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from components.models.sd3.text_encoders import build_tiny_sd3_text_encoders
    from components.models.sd3.transformer import build_tiny_sd3_transformer

    encoders = build_tiny_sd3_text_encoders(texts, CAPTIONS)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=2,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    StableDiffusion3Pipeline(
        transformer=build_tiny_sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders.text_encoder,
        tokenizer=encoders.tokenizer,
        text_encoder_2=encoders.text_encoder_2,
        tokenizer_2=encoders.tokenizer_2,
        text_encoder_3=encoders.text_encoder_3,
        tokenizer_3=encoders.tokenizer_3,
    ).save_pretrained(folder)


def save_pixart_sigma(folder: Path, texts: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    from components.models.text_encoders import build_tiny_text_encoders

    encoders = build_tiny_text_encoders(texts, CAPTIONS, t5_dim=32, clip_dim=24)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )
    PixArtSigmaPipeline(
        tokenizer=encoders.tokenizer_2,
        text_encoder=encoders.text_encoder_2,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def save_sana(folder: Path, _texts: Path) -> None:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = [chr(code) for code in range(33, 127)] + ["\u2581"]
    vocabulary = {token: index for index, token in enumerate((*specials, *letters))}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a suite of two sizes, and the folders of three published systems."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy2(root / name, folder / name)
    shutil.copytree(root / "conf", folder / "conf")
    (folder / "real").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for number, (height, width) in enumerate(((64, 96), (96, 64))):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "real" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": CAPTIONS[number]}))
    (folder / "real" / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    for name, save in (
        ("sd3", save_sd3),
        ("sana", save_sana),
        ("pixart-sigma", save_pixart_sigma),
    ):
        save(folder / "weights" / PRESETS[name].folder, folder / f"texts-{name}")
    return folder


@pytest.mark.slow
def test_sd3_sana_and_pixart_sigma_are_sampled_and_scored_by_the_command(
    project: Path, root: Path
) -> None:
    def run() -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "flows.cli", "evaluate", "real", "--steps", "2"),
                *("--system", "sd3=sd3", "--system", "sana=sana", "--system", "px=pixart-sigma"),
                *("--metrics", "compression_ratio,colourfulness"),
            ],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "6 pictures, 6 decoded" in run()
    out = project / "runs" / "evaluations" / "real"
    table = pd.read_parquet(out / "scores.parquet")
    assert set(table["system"]) == {"sd3", "sana", "px"}
    assert table["value"].notna().all()
    made = sorted(out.glob("images/*/*.png"))
    assert len(made) == 6
    for path in made:
        with Image.open(path) as image:
            assert image.size == ((96, 64) if path.stem == "0" else (64, 96))
            assert image.info["prompt"] == CAPTIONS[int(path.stem)]
    assert len({path.read_bytes() for path in made}) == 6
    before = {path: path.stat().st_mtime_ns for path in made}
    assert "6 pictures, 0 decoded" in run()
    assert before == {path: path.stat().st_mtime_ns for path in made}
