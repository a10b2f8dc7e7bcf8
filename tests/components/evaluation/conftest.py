"""A tiny pipeline, an evaluation as `ultraflux evaluate` leaves it, and a browser for its page."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.suites.suite_scores import headline
from components.metrics.cards import card

HEIGHT, WIDTH, ITEMS = 540, 700, 8
# Item 3 is where "mine" loses most PSNR (9 dB), item 5 where it loses most SSIM.
PSNR = {"base": [30.0 + n for n in range(ITEMS)], "mine": [29, 30, 31, 24, 33, 34, 35, 40]}
SSIM = {"base": [0.9] * ITEMS, "mine": [0.95, 0.85, 0.9, 0.89, 0.9, 0.5, 0.9, 0.9]}


def write_pictures(root: Path) -> list[dict[str, str]]:
    """Smooth pictures with one rectangle of noise each, in two systems."""
    rng = np.random.default_rng(0)
    pictures = []
    for system, offset in (("base", 0), ("mine", 12)):
        (root / system).mkdir(parents=True)
        for number in range(ITEMS):
            ramp = np.linspace(0, 200, WIDTH)[None, :, None] + offset
            pixels = np.broadcast_to(ramp, (HEIGHT, WIDTH, 3)).astype(np.uint8).copy()
            pixels[40:100, 300:400] = rng.integers(0, 255, (60, 100, 3), dtype=np.uint8)
            pixels[:20, : 20 * (number + 1)] = 255
            path = root / system / f"{number}.png"
            Image.fromarray(pixels).save(path)
            pictures.append(
                {"system": system, "item": f"item{number}", "path": f"{system}/{number}.png"}
                | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                | {"prompt": f"<b>prompt</b> {number} & more", "reference": f"base/{number}.png"}
            )
    return pictures


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation of two systems on eight items; its pictures lie in the parent."""
    tmp_path = tmp_path_factory.mktemp("suite")
    pictures = write_pictures(tmp_path)
    rows = [
        {"image": Path(p["path"]).name, "system": p["system"], "height": HEIGHT, "width": WIDTH}
        | {"metric": metric, "protocol": card(metric).protocol, "item": p["item"]}
        | {"value": float(values[p["system"]][int(p["item"][4:])]), "stratum": "700x540"}
        | {"image_sha256": p["sha256"], "error": None}
        for p in pictures
        for metric, values in (("psnr_db", PSNR), ("ssim", SSIM))
    ]
    table = pd.DataFrame(rows)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    table.to_parquet(folder / "scores.parquet", index=False)
    description = {
        "suite": "reconstruction",
        "protocol": "reconstruction-4096/v1",
        "items": ITEMS,
        "metrics": headline(table, resamples=200, seed=0) | {"mine.rfid": 1.25},
        "unavailable": {"lpips": "weights missing"},
        "failed_systems": {},
    }
    (folder / "metrics.json").write_text(json.dumps(description))
    lines = "\n".join(json.dumps(picture) for picture in pictures)
    (folder / "pictures.jsonl").write_text(lines + "\n")
    return folder


@pytest.fixture
def browser() -> ModuleType:
    """The DevTools client of the benchmarks; `browser.open_browser()` needs Debian's chromium."""
    import browser

    return browser


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
