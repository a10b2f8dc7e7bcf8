"""Stage `text_embeddings`: T5 and CLIP embeddings of all English captions, for the backbone."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import folder_digest
from components.files.whole_files import whole_folder
from components.models.loading.text_families import TEXT_FAMILIES, TextFamily
from components.training.encoding.encoder_workers import Placement, encoder_limits
from components.training.encoding.text_workers import EmbeddingFailed, TextJob, embed_batches
from components.training.stores.text_store import build_text_store
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write the text store, and in the tiny case the encoders, to `data/text_embeddings/`.

    Embeds `caption_en` of training and evaluation rows, and the empty prompt. Without a
    pretrained folder the tokenizers are trained on the training captions only, and the encoders
    are saved in `encoders/` in the layout of FLUX.1-dev or SD3 for `generate`.

    Raises:
        StageFailed: a row has no caption, or the captions cannot be embedded.
    """
    settings = context.settings.models.text_encoders
    rows = pd.read_parquet(
        context.input("slices", "manifest.parquet"), columns=["image_id", "split", "caption_en"]
    )
    rows = rows[rows["split"].isin(["train", "eval"])].sort_values("image_id")
    rows = rows.drop_duplicates("image_id")
    silent = rows[rows["caption_en"].fillna("").str.strip() == ""]
    if not silent.empty:
        raise StageFailed(
            f"text_embeddings: {len(silent)} rows have no English caption, first image "
            f"{silent['image_id'].iloc[0]}; caption them or reject them in `select`"
        )
    family = TEXT_FAMILIES[context.settings.models.transformer.backbone]
    folder = _encoder_folder(context, rows, family)
    # Before the digest: a missing part is named together with the command that gets it.
    family.load(folder)
    digest = _encoder_digest(folder, family)
    # One storage precision for everything that the transformer reads.
    dtype = context.settings.latents.dtype
    limits = encoder_limits(context.settings, context.settings.models.text_encoders.pretrained)
    job = TextJob(
        backbone=context.settings.models.transformer.backbone,
        folder=str(folder),
        max_sequence_length=settings.max_sequence_length,
        dtype=dtype,
        placement=Placement.of(context.settings, context.state_dir),
    )
    try:
        store = build_text_store(
            context.state_dir / "store",
            context.output_dir,
            dict(zip(rows["image_id"], rows["caption_en"], strict=True)),
            partial(embed_batches, job=job, limits=limits),
            encoder_digest=digest,
            dtype=dtype,
            shard_mb=context.settings.latents.shard_mb,
            provenance=_provenance(context, digest),
        )
    except (ValueError, EmbeddingFailed, WorkersDoNotStart) as problem:
        raise StageFailed(f"text_embeddings: {problem}") from problem
    captions = int(store.index["caption_sha256"].nunique())
    return StageResult(
        metrics={"captions": float(captions), "images": float(len(rows))},
        datasets={"text_embeddings": context.output_dir / "index.parquet"},
        tags={"text_encoders.digest": digest, "text_embeddings.digest": store.digest},
        summary=f"{captions} prompts, {int(store.index['text_tokens'].iloc[0])} tokens each",
    )


def _provenance(context: StageContext, digest: str) -> dict[str, Any]:
    """What the embeddings came from: encoders, padding, arithmetic, software."""
    settings = context.settings
    return {
        "encoders": list(TEXT_FAMILIES[settings.models.transformer.backbone].folders),
        "encoder_digest": digest,
        "pretrained": settings.models.text_encoders.pretrained,
        "max_sequence_length": settings.models.text_encoders.max_sequence_length,
        "padded": True,
        "device": settings.runtime.device,
        "software": {
            name: importlib.metadata.version(name)
            for name in ("torch", "diffusers", "transformers", "tokenizers")
        },
    }


def _encoder_digest(folder: Path, family: TextFamily) -> str:
    """Identity of the text parts (a FLUX.1-dev folder also holds what is not read here)."""
    parts = [f"{name}={folder_digest(folder / name)}" for name in family.folders]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _encoder_folder(context: StageContext, rows: pd.DataFrame, family: TextFamily) -> Path:
    """The pretrained folder, or tiny encoders built from the training captions."""
    settings = context.settings.models.text_encoders
    if settings.pretrained is not None:
        return context.root / settings.pretrained
    folder = context.output_dir / "encoders"
    with whole_folder(folder) as aside:
        family.build_tiny(
            aside,
            rows.loc[rows["split"] == "train", "caption_en"].tolist(),
            seed=context.settings.project.seed,
            t5_dim=settings.tiny.t5_dim,
            clip_dim=settings.tiny.clip_dim,
            vocab_size=settings.tiny.vocab_size,
        )
    return folder
