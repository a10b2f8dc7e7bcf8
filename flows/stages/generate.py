"""Stage `generate`: held-out captions to images, every size, with the trained models."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pandas as pd
import torch
from PIL import Image

from components.files.whole_files import write_text
from components.generation import sampling
from components.generation.contact_sheet import contact_sheet
from components.models.loading.memory_modes import MemoryModes
from components.models.loading.released import source_digests
from flows.stages.contract import StageContext, StageFailed, StageResult

_CELL_PX = 320


def run(context: StageContext) -> StageResult:
    """Write `data/generate/{images/*.png, generations.jsonl, grid.png}`.

    Finished images live in the state folder with their key inside, so a killed run goes on where
    it stopped.

    Raises:
        StageFailed: no held-out image has a caption.
    """
    settings = context.settings
    prompts = _held_out_prompts(context)
    context.input("vae", "autoencoder")
    context.input("dit_stage2", settings.generate.weights)
    sources = sampling.model_sources(context.root, settings)
    torch.set_num_threads(settings.runtime.torch_threads)
    digests = source_digests(sources)
    sampler = sampling.sampler_settings(settings)
    requests = sampling.make_requests(prompts, settings.generate.sizes, settings.generate.seed)
    finished = context.state_dir / "images"
    generations = sampling.generate_images(
        lambda: sampling.load_model(
            sources, sampler, device=settings.runtime.device, memory=MemoryModes()
        ),
        requests,
        finished,
        sampler=sampler,
        digests=digests,
        description=context.stage,
    )
    images_dir = context.output_dir / "images"
    images_dir.mkdir(exist_ok=True)
    wanted = {generation.file for generation in generations}
    for stale in images_dir.iterdir():
        if stale.name not in wanted:
            stale.unlink()
    for generation in generations:
        shutil.copyfile(finished / generation.file, images_dir / generation.file)
    log = context.output_dir / "generations.jsonl"
    lines = (json.dumps(asdict(g), ensure_ascii=False, sort_keys=True) for g in generations)
    write_text(log, "".join(f"{line}\n" for line in lines))
    grid = context.output_dir / "grid.png"
    contact_sheet(
        [Image.open(images_dir / generation.file) for generation in generations],
        columns=len(settings.generate.sizes),
        cell_px=_CELL_PX,
    ).save(grid)
    sizes = len(settings.generate.sizes)
    return StageResult(
        metrics={"images": float(len(generations)), "sizes": float(sizes)},
        artifacts=(grid, images_dir, log),
        tags={f"sha256.{name}": digest for name, digest in digests.items()},
        summary=f"{len(generations)} images: {len(prompts)} prompts at {sizes} sizes",
    )


def _held_out_prompts(context: StageContext) -> list[tuple[str, str]]:
    """(image_id, English caption) of the first held-out images."""
    table = pd.read_parquet(
        context.input("slices", "eval.parquet"), columns=["image_id", "caption_en"]
    )
    table = table[table["caption_en"].notna() & (table["caption_en"] != "")]
    chosen = table.head(context.settings.generate.prompts)
    if chosen.empty:
        raise StageFailed(
            "generate: data/slices/eval.parquet holds no captioned image to take a prompt from; "
            "raise slices.eval_min_images or add photographs"
        )
    return list(zip(chosen["image_id"], chosen["caption_en"], strict=True))
