"""The slices of a corpus to latents: settings and tables in, one verified store out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from components.corpus.manifest import read_table
from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder
from components.settings.schema import Settings
from components.training.distributed.ranks import deterministic_torch
from components.training.encoding.encoder_workers import Placement, encoder_limits
from components.training.encoding.latent_workers import LatentJob, latent_workers
from components.training.encoding.latents import (
    EncodingItem,
    Posterior,
    Workers,
    encode_corpus,
    encoding_items,
)
from components.training.encoding.store_check import rebuild_shard
from components.training.stores.latent_store import LatentStore

# Stage 2 trains on a part of stage 1's images, and `vae` on photographs themselves.
ENCODED_SLICES = ("stage1.parquet", "eval.parquet")


def encode_slices(
    settings: Settings,
    slices: Sequence[Path],
    *,
    root: Path,
    state_dir: Path,
    destination: Path,
) -> LatentStore:
    """Encode every photograph of some slices with the frozen base encoder.

    Continues where a killed run with the same `state_dir` stopped.

    Args:
        settings: of the project.
        slices: Parquet tables, such as `ENCODED_SLICES`.
        root: where URIs and relative weight folders start.
        state_dir: unfinished work, private to these settings.
        destination: folder of the store.

    Raises:
        WeightsMissing: the autoencoder's folder is not there.
        ValueError: no images, an image in two splits, an original is missing, or more photographs
            than the settings allow cannot be encoded (`TooManyRejected`).
        WorkersDoNotStart: encoders elsewhere cannot be started.
    """
    items = _items(slices, root)
    autoencoder = load_base_autoencoder(settings.models.autoencoder, settings.project.seed, root)
    if not items:
        raise ValueError("the slices are empty; relax the rules in `select` or add photos")
    # Workers set the same number of threads, so a store does not tell who encoded it.
    with deterministic_torch(settings.runtime.torch_threads):
        return encode_corpus(
            items,
            autoencoder,
            settings.latents,
            work_dir=state_dir / "encoding",
            destination=destination,
            device=settings.runtime.device,
            max_megapixels=settings.ingest.max_megapixels,
            workers=_workers(settings, root, state_dir, encoder_digest(autoencoder)),
            posterior=Posterior.of(settings.latents, settings.project.seed),
        )


def rebuild_from_slices(
    settings: Settings, slices: Sequence[Path], store: LatentStore, shard: str, *, root: Path
) -> int:
    """Encode one damaged shard again from the photographs; see `rebuild_shard`.

    Args:
        settings: with which the store was made.
        slices: from which it was made; the batches of the first time follow from all of them.
        store: that the shard belongs to.
        shard: file name.
        root: as in `encode_slices`.

    Returns:
        number of records.

    Raises:
        WeightsMissing: the autoencoder's folder is not there.
        ValueError: no such shard, an original is missing, or a record comes out differently.
    """
    # From all slices, as the first time: batches follow from all of them, and rounding from
    # batches.
    items = _items(slices, root)
    autoencoder = load_base_autoencoder(settings.models.autoencoder, settings.project.seed, root)
    with deterministic_torch(settings.runtime.torch_threads):
        return rebuild_shard(
            store,
            shard,
            items,
            autoencoder.to(settings.runtime.device),
            settings.latents,
            max_megapixels=settings.ingest.max_megapixels,
            posterior=Posterior.of(settings.latents, settings.project.seed),
        )


def _items(slices: Sequence[Path], root: Path) -> list[EncodingItem]:
    # Slices may overlap; `encoding_items` takes each image once and refuses one with two splits.
    return encoding_items(pd.concat([read_table(path) for path in slices]), root)


def _workers(settings: Settings, root: Path, state_dir: Path, digest: str) -> Workers | None:
    """Encoders elsewhere, where the settings want them."""
    # None: the network is so small, or the machine so, that this process is quickest.
    limits = encoder_limits(settings, settings.models.autoencoder.pretrained)
    if limits is None:
        return None
    job = LatentJob(
        autoencoder=settings.models.autoencoder,
        seed=settings.project.seed,
        root=str(root),
        # Workers on other machines compare it with what they have loaded.
        digest=digest,
        dtype=settings.latents.dtype,
        max_megapixels=settings.ingest.max_megapixels,
        posterior=Posterior.of(settings.latents, settings.project.seed),
        placement=Placement.of(settings, state_dir),
    )
    return latent_workers(job, limits)
