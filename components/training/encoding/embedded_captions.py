"""The captions of a corpus to text embeddings: settings and a manifest in, one store out."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from components.files.weight_folders import folder_digest
from components.files.whole_files import whole_folder
from components.models.backbone import TextFamily
from components.models.backbones import BACKBONES
from components.models.loading.quantisation import require_library
from components.models.text_lengths import as_json, text_lengths, text_limits
from components.settings.models import Quantisation
from components.settings.schema import Settings
from components.training.encoding.encoder_workers import Placement, encoder_limits
from components.training.encoding.text_workers import TextJob, embed_batches
from components.training.stores.text_store import TextStore, build_text_store

ENCODERS_FOLDER = "encoders"
LENGTHS = "caption_lengths"
"""Entry of store.json: per encoder its limit of tokens, and how many captions it cuts."""


def embed_captions(
    settings: Settings, manifest: Path, *, root: Path, state_dir: Path, destination: Path
) -> TextStore:
    """Embed `caption_en` of all training and held-out images, and the empty prompt.

    Without a pretrained folder tiny encoders are built first, their tokenizers trained on the
    training captions alone, and left in `destination/encoders/` in the layout of the published
    weights, where sampling finds them. Continues where a killed run with the same `state_dir`
    stopped.

    Args:
        settings: of the project.
        manifest: Parquet with image_id, split and caption_en.
        root: where a relative weights folder starts.
        state_dir: unfinished work, private to these settings.
        destination: folder of the store.

    Raises:
        WeightsMissing: a part of the pretrained encoders is not there.
        ValueError: an image has no caption, or an embedding is not finite.
        EmbeddingFailed: captions cannot be embedded by any worker.
        WorkersDoNotStart: encoders elsewhere cannot be started.
    """
    rows = _captioned_rows(manifest)
    backbone = settings.models.transformer.backbone
    family = BACKBONES[backbone].text_family()
    folder = _encoder_folder(settings, rows, family, root, destination)
    # Before the digest: a missing part is named together with the command that gets it.
    encoders = family.load(folder)
    tokenizers = {name: getattr(encoders, name) for name in family.folders if "tokenizer" in name}
    length = settings.models.text_encoders.max_sequence_length
    lengths = text_lengths(text_limits(BACKBONES[backbone], tokenizers, length), rows["caption_en"])
    rounding = settings.models.text_encoders.quantisation
    # Here and not in a worker, which would be started again and again.
    require_library(rounding, "models.text_encoders.quantisation")
    digest = encoders_digest(folder, family, rounding)
    # One storage precision for everything that the transformer reads.
    dtype = settings.latents.dtype
    job = TextJob(
        backbone=backbone,
        folder=str(folder),
        max_sequence_length=settings.models.text_encoders.max_sequence_length,
        dtype=dtype,
        placement=Placement.of(settings, state_dir),
        quantisation=rounding,
    )
    limits = encoder_limits(settings, settings.models.text_encoders.pretrained)
    return build_text_store(
        state_dir / "store",
        destination,
        dict(zip(rows["image_id"], rows["caption_en"], strict=True)),
        partial(embed_batches, job=job, limits=limits),
        encoder_digest=digest,
        dtype=dtype,
        shard_mb=settings.latents.shard_mb,
        provenance=_provenance(settings, digest) | {LENGTHS: as_json(lengths)},
    )


def _captioned_rows(manifest: Path) -> pd.DataFrame:
    """One row per image that is trained on or held out, by image id."""
    rows = pd.read_parquet(manifest, columns=["image_id", "split", "caption_en"])
    # Sorted, so that the store does not depend on the manifest's order.
    rows = rows[rows["split"].isin(["train", "eval"])].sort_values("image_id")
    rows = rows.drop_duplicates("image_id")
    # An empty caption would be trained as the empty prompt, silently.
    silent = rows[rows["caption_en"].fillna("").str.strip() == ""]
    if not silent.empty:
        raise ValueError(
            f"{len(silent)} rows have no English caption, first image "
            f"{silent['image_id'].iloc[0]}; caption them or reject them in `select`"
        )
    return rows


def _encoder_folder(
    settings: Settings, rows: pd.DataFrame, family: TextFamily, root: Path, destination: Path
) -> Path:
    """The pretrained folder, or tiny encoders built from the training captions."""
    encoders = settings.models.text_encoders
    if encoders.pretrained is not None:
        return root / encoders.pretrained
    folder = destination / ENCODERS_FOLDER
    # Built again by every run: the tokenizers give the same bytes in every process.
    with whole_folder(folder) as aside:
        family.build_tiny(
            aside,
            # A held-out caption must not shape the vocabulary that it is scored with.
            rows.loc[rows["split"] == "train", "caption_en"].tolist(),
            seed=settings.project.seed,
            t5_dim=encoders.tiny.t5_dim,
            clip_dim=encoders.tiny.clip_dim,
            vocab_size=encoders.tiny.vocab_size,
        )
    return folder


def encoders_digest(folder: Path, family: TextFamily, quantisation: Quantisation = "none") -> str:
    """Identity of the text parts (a FLUX.1-dev folder also holds what is not read here)."""
    # Of folders by name, so that exchanged encoders do not have the same digest.
    parts = [f"{name}={folder_digest(folder / name)}" for name in family.folders]
    if quantisation != "none":
        parts.append(f"quantisation={quantisation}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _provenance(settings: Settings, digest: str) -> dict[str, Any]:
    """What the embeddings came from: encoders, padding, arithmetic, software."""
    return {
        "encoders": list(BACKBONES[settings.models.transformer.backbone].text_family().folders),
        "encoder_digest": digest,
        "pretrained": settings.models.text_encoders.pretrained,
        "max_sequence_length": settings.models.text_encoders.max_sequence_length,
        "padded": True,
        "device": settings.runtime.device,
        # For people who look for the cause of a difference; the store's digest leaves it out.
        "software": {
            name: importlib.metadata.version(name)
            for name in ("torch", "diffusers", "transformers", "tokenizers")
        },
    }
