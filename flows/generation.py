"""`ultraflux generate`: one image from the weights that the pipeline trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path


class GenerationRefused(ValueError):
    """The request cannot be met; one line."""


def parse_size(size: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT".

    Raises:
        GenerationRefused: not of that form, or an edge is not a positive multiple of 32.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", size)
    if match is None:
        raise GenerationRefused(f"--size {size}: expected WIDTHxHEIGHT, such as 5120x2880")
    width, height = int(match[1]), int(match[2])
    for edge in (width, height):
        if edge == 0 or edge % 32:
            near = max(32, round(edge / 32) * 32)
            raise GenerationRefused(
                f"--size {size}: {edge} is not a multiple of 32; the nearest is {near}"
            )
    return height, width


def generate_one(
    root: Path, prompt: str, size: str, *, seed: int, steps: int | None, folder: Path
) -> Path:
    """Sample one image and return its path.

    Args:
        root: repository root with trained weights under `data/`.
        prompt: what to paint.
        size: "WIDTHxHEIGHT" in pixels.
        seed: of the noise.
        steps: denoising steps; None: the settings' value.
        folder: where the PNG goes.

    Raises:
        GenerationRefused: bad size or empty prompt.
        components.models.weights.WeightsMissing: the pipeline has not trained them yet.
    """
    height, width = parse_size(size)
    if not prompt.strip():
        raise GenerationRefused("--prompt: empty; say what to paint")
    from components.evaluation import sampling
    from components.models.weights import resolve_folder
    from components.settings import load_settings
    from flows import environment

    settings = load_settings(root / "params.yaml")
    environment.prepare(offline=settings.runtime.offline)
    folders = sampling.model_folders(root, settings)
    for kind in ("autoencoder", "transformer"):
        resolve_folder(folders[kind], f"trained {kind}", "ultraflux run")
    sampler = sampling.sampler_settings(settings)
    if steps is not None:
        sampler = replace(sampler, num_inference_steps=steps)
    request = sampling.GenerationRequest(
        prompt=prompt, seed=seed, height=height, width=width, name=f"{width}x{height}_seed{seed}"
    )
    made = sampling.generate_images(
        lambda: sampling.load_pipeline(root, settings),
        [request],
        folder,
        sampler=sampler,
        digests=sampling.model_digests(folders),
    )
    return folder / made[0].file
