"""Check every record of a store against its hash, and encode a damaged shard of latents again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import xxhash

from components.files.whole_files import whole_file
from components.settings.training import LatentsSettings
from components.training.stores.latent_store import LatentStore
from components.training.stores.record_reader import Extents, RecordCorrupt, RecordReader
from components.training.stores.record_writer import INDEX_FILE

if TYPE_CHECKING:
    from components.models.autoencoder_f16 import AutoencoderKLF16
    from components.training.encoding.latents import EncodingItem, Posterior

_BATCH_BYTES = 64 * 2**20


class RebuildDiffers(ValueError):
    """A shard encoded again is not the one in the index; one line."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is not what was written."""

    shard: str
    image_id: str
    """The first that has it, where captions share a record."""
    problem: str


@dataclass(frozen=True)
class StoreCheck:
    """What reading a whole store found."""

    shards: int
    records: int
    nbytes: int
    seconds: float
    bad: tuple[BadRecord, ...]


def check_store(folder: Path) -> StoreCheck:
    """Read every record of a latent or text store and compare its hash.

    Raises:
        ValueError: the folder holds no finished store of fixed-size records.
    """
    path = folder / INDEX_FILE
    # Common to all stores: checking needs to know neither the kind nor its version.
    columns = ["image_id", "shard", "offset", "nbytes", "xxh64"]
    try:
        index = pd.read_parquet(path, columns=columns)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: no {INDEX_FILE}; not a finished store") from None
    except (OSError, KeyError, ValueError) as problem:
        detail = " ".join(str(problem).split())
        raise ValueError(f"{path}: not the index of a store ({detail})") from None
    # Equal captions share a record; in disk order, so that reading is sequential.
    index = index.drop_duplicates(["shard", "offset"]).sort_values(["shard", "offset"])
    extents = Extents.of(index)
    reader = RecordReader(folder, extents)
    ids = index["image_id"].to_list()
    bad: list[BadRecord] = []

    def read(rows: Sequence[int]) -> None:
        size = int(extents.nbytes[rows[0]])
        try:
            reader.read_into(rows, np.empty((len(rows), size), dtype=np.uint8))
        except RecordCorrupt as problem:
            if len(rows) > 1:
                # The reader stops at the first: once more one by one, so that each bad record is
                # named.
                for row in rows:
                    read([row])
            else:
                bad.append(BadRecord(problem.shard, ids[rows[0]], problem.problem))

    begin = time.perf_counter()
    rows = np.arange(len(index))
    # One buffer takes records of one size.
    for size in np.unique(extents.nbytes):
        alike = rows[extents.nbytes == size].tolist()
        # Bounded by bytes: records are from a few KiB to several MiB.
        step = max(1, _BATCH_BYTES // max(1, int(size)))
        for start in range(0, len(alike), step):
            read(alike[start : start + step])
    reader.close()
    return StoreCheck(
        len(extents.shards),
        len(index),
        int(extents.nbytes.sum()),
        time.perf_counter() - begin,
        tuple(bad),
    )


def rebuild_shard(
    store: LatentStore,
    shard: str,
    items: Sequence[EncodingItem],
    autoencoder: AutoencoderKLF16,
    settings: LatentsSettings,
    *,
    max_megapixels: float,
    posterior: Posterior,
) -> int:
    """Encode the photographs of one shard again, in the batches of the first time.

    The shard is replaced only when every record has the hash that the index names.

    Args:
        store: that the shard belongs to.
        shard: file name.
        items: of the whole corpus, as when the store was made.
        autoencoder: of the store, on the device that encodes.
        settings: of the store.
        max_megapixels: bound on decoded photographs.
        posterior: of the store.

    Returns:
        number of records.

    Raises:
        ValueError: the store has no such shard.
        RebuildDiffers: a record came out differently: encoder, photographs or software changed.
    """
    # Imports diffusers, which a check of hashes does without.
    from components.training.encoding.latents import batches, encode_batch

    rows = store.index[store.index["shard"] == shard].sort_values("offset")
    if rows.empty:
        known = sorted(store.index["shard"].unique())
        raise ValueError(f"{store.folder} has no shard {shard}; it has {', '.join(known[:5])}")
    wanted = set(rows["image_id"])
    records: dict[str, bytes] = {}
    # Whole batches of the first time: alone, a photograph's sums may be rounded differently.
    for batch in batches(items, settings.batch_size):
        if wanted & {item.image_id for item in batch}:
            encoded = encode_batch(batch, autoencoder, settings.dtype, max_megapixels, posterior)
            records |= encoded.records
    # All are compared before one byte is written: a shard half of new bytes helps nobody.
    differs = [
        str(row.image_id)
        for row in rows.itertuples(index=False)
        if xxhash.xxh64_hexdigest(records.get(str(row.image_id), b"")) != row.xxh64
    ]
    if differs:
        raise RebuildDiffers(
            f"shard {shard}: {len(differs)} of {len(rows)} records come out differently (first "
            f"image {differs[0]}): encoder, photographs, settings or software are not those of "
            "the store; run `ultraflux stage run latents` for a new one"
        )
    # Durable, because the index already promises these bytes: a power cut must not leave less.
    with whole_file(store.folder / shard, durable=True) as temporary, temporary.open("wb") as file:
        file.writelines(records[str(image_id)] for image_id in rows["image_id"])
    return len(rows)
