"""An adapter of `ultraflux stage run` on an int8 base, in stock diffusers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rounded_base_kill
import small_project
import torch
from diffusers import FluxPipeline
from PIL import Image

from components.training.adapters.adapter_files import ADAPTER_FILE

PROMPT = "a boat on a still river at dawn"
STEPS, SEED, GUIDANCE = 4, 3, 4.0
SHORT = {
    "vae.steps": 1,
    "vae.eval_every": 1,
    "vae.checkpoint_every": 1,
    "dit_stage1.steps": 8,
    # Enough for pictures that differ at a glance.
    "dit_stage1.learning_rate": 0.03,
    "dit_stage1.warmup_steps": 0,
}


@pytest.mark.slow
def test_stock_diffusers_paints_with_the_adapter_what_generate_paints_with_the_merged_weights(
    clone: Callable[..., Path],
) -> None:
    project = clone("int8", small_project.SETTINGS, small_project.PHOTOS)
    rounded_base_kill.prepare(project, "int8")
    small_project.change_settings(project, SHORT)
    rounded_base_kill.make_inputs(project)
    trained = rounded_base_kill.finish(project)
    assert f"ema/{ADAPTER_FILE}" in trained
    base, adapted = project / rounded_base_kill.BASE, project / "data" / "dit_stage1" / "ema"
    assert "held as `int8`" in (adapted / "README.md").read_text()
    # The pipeline of the base: its autoencoder (F8), positions and schedule.
    subprocess.run(
        ["ultraflux", "generate", "--model", adapted, "--base", base, "--rope", "flux",
         "--vae-stride", "1", "--schedule", "dynamic", "--prompt", PROMPT, "--size", "128x96",
         "--steps", str(STEPS), "--seed", str(SEED), "--guidance-scale", str(GUIDANCE),
         "--quantise", "none", "--dtype", "float32", "--output", "pictures"],
        cwd=project, env=rounded_base_kill.environment(project), check=True,
    )  # fmt: skip
    (file,) = (project / "pictures").glob("*.png")
    with Image.open(file) as picture:
        ours = np.asarray(picture, dtype=np.int16)

    stock = FluxPipeline.from_pretrained(base)
    before = painted(stock)
    stock.load_lora_weights(adapted)
    assert np.abs(painted(stock) - ours).max() <= 1
    assert np.abs(before - ours).max() > 16


def painted(pipeline: FluxPipeline) -> np.ndarray:
    image = pipeline(
        PROMPT,
        width=128,
        height=96,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    return np.asarray(image, dtype=np.int16)
