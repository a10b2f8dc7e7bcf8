"""A small DiT training job on random latents, for measurements of the trainer."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from components.settings.schema import parse_settings
from components.training.dit.job import DitJob
from components.training.stores.latent_store import LatentStoreWriter
from components.training.stores.text_store import build_text_store, embedded_prompts

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 8
LATENT_PX = 16
TEXT_TOKENS, TEXT_WIDTH = 16, 32


def write_stores(folder: Path, latent_px: int = LATENT_PX) -> None:
    """`folder/latents` and `folder/texts`: 8 training images and one held out, all random."""
    generator = torch.Generator().manual_seed(0)
    writer = LatentStoreWriter(
        folder / "writing", dtype="float32", shard_mb=1, encoder_digest="synthetic"
    )
    names = [(f"image{number}", "train") for number in range(IMAGES)] + [("held-out", "eval")]
    size_px = (latent_px * 16, latent_px * 16)
    for name in names:
        writer.append(
            size_px, [name], torch.randn(1, 16, latent_px, latent_px, generator=generator)
        )
    writer.publish(folder / "latents")

    def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(prompts), TEXT_TOKENS, TEXT_WIDTH)
        return torch.randn(shape, generator=generator), torch.randn(
            len(prompts), TEXT_WIDTH, generator=generator
        )

    build_text_store(
        folder / "embedding",
        folder / "texts",
        {name: name for name, _ in names},
        lambda plan: (embedded_prompts(prompts, embed, "float32") for prompts in plan),
        encoder_digest="synthetic",
        dtype="float32",
    )


def make_job(
    stores: Path,
    folder: Path,
    *,
    heads: int,
    layers: int,
    stage: dict[str, object],
    runtime: dict[str, object] | None = None,
) -> DitJob:
    """A job on what `write_stores` wrote.

    Args:
        stores: its folder.
        folder: where state, exports and metrics go.
        heads: attention heads.
        layers: double blocks; twice as many single blocks.
        stage: stage settings that replace those of params.yaml.
        runtime: likewise.
    """
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["transformer"]["pretrained"] = None
    values["models"]["transformer"]["tiny"].update(
        num_layers=layers, num_single_layers=2 * layers, num_attention_heads=heads
    )
    values["dit_stage1"].update(stage)
    values["runtime"].update(runtime or {})
    settings = parse_settings(values)
    return DitJob(
        name="dit_stage1",
        settings=settings.dit_stage1,
        objective=settings.objective,
        transformer=settings.models.transformer,
        runtime=settings.runtime,
        seed=0,
        latents=stores / "latents",
        texts=stores / "texts",
        train_slice=None,
        autoencoder=None,
        initial_weights=None,
        state_dir=folder / "state",
        export_dir=folder / "export",
        metrics=folder / "metrics.jsonl",
    )
