"""A corpus of synthetic latents and a small training job on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.settings.schema import parse_settings
from components.training.stores.latent_store import LatentStoreWriter
from components.training.stores.text_store import build_text_store, embedded_prompts

ROOT = Path(__file__).resolve().parents[3]
BUCKETS = ((128, 128), (96, 192), (192, 96))
TEXT_TOKENS, TEXT_WIDTH = 8, 16


def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings that depend on the prompt alone."""
    sequences, vectors = [], []
    for prompt in prompts:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        sequences.append(torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=generator))
        vectors.append(torch.randn(TEXT_WIDTH, generator=generator))
    return torch.stack(sequences), torch.stack(vectors)


@pytest.fixture(scope="session")
def dit_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `latents` (9 train, 2 eval; smooth 16-channel latents) and `texts`."""
    root = tmp_path_factory.mktemp("dit_corpus")
    writer = LatentStoreWriter(
        root / "writing", dtype="float32", shard_mb=1, encoder_digest="synthetic"
    )
    generator = torch.Generator().manual_seed(0)
    captions = {}
    for number in range(11):
        bucket = BUCKETS[number % len(BUCKETS)]
        coarse = torch.randn(1, 16, 2, 2, generator=generator)
        size = (bucket[0] // 16, bucket[1] // 16)
        latent = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
        image_id = f"image{number:02d}"
        writer.append(bucket, [(image_id, "eval" if number < 2 else "train")], latent)
        captions[image_id] = f"caption {number}"
    writer.publish(root / "latents")
    build_text_store(
        root / "embedding",
        root / "texts",
        captions,
        lambda plan: (embedded_prompts(prompts, embed, "float32") for prompts in plan),
        encoder_digest="synthetic",
        dtype="float32",
    )
    return root


@pytest.fixture
def make_dit_job(dit_corpus: Path) -> Callable[..., object]:
    """Make a small job; keyword arguments replace stage settings."""
    import yaml

    from components.training.dit.job import DitJob

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    small = {
        "steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "validate_every": 2,
        "validation_repeats": 1,
        "watch_every": 2,
        "checkpoint_every": 2,
        "warmup_steps": 2,
        "precision": "bf16",
        "ema_decay": 0.9,
        "learning_rate": 2e-3,
        "schedule": "constant",
        "initial_weights": "pretrained",
        "timestep_density": "logit_normal",
        "sigma_range": [0.0, 1.0],
        "zero_stage": 2,
    }

    def make(
        folder: Path,
        processes: int = 1,
        context_parallel_degree: int = 1,
        compile: str = "none",
        **changes: object,
    ) -> DitJob:
        values["dit_stage1"].update(small | changes)
        values["runtime"].update(
            processes=processes,
            context_parallel_degree=context_parallel_degree,
            compile=compile,
            torch_threads=1,
            device="cpu",
        )
        values["models"]["transformer"]["pretrained"] = None
        values["models"]["transformer"]["tiny"] = {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "axes_dims_rope": [4, 6, 6],
        }
        settings = parse_settings(values)
        return DitJob(
            name="dit_stage1",
            settings=settings.dit_stage1,
            objective=settings.objective,
            transformer=settings.models.transformer,
            runtime=settings.runtime,
            seed=settings.project.seed,
            latents=dit_corpus / "latents",
            texts=dit_corpus / "texts",
            train_slice=None,
            autoencoder=None,
            initial_weights=None,
            state_dir=folder / "state",
            export_dir=folder / "export",
            metrics=folder / "metrics.jsonl",
        )

    return make
