"""Text embeddings of a corpus: a sequence of states and a pooled CLIP vector per caption.

The states (stored as `t5`) are T5's for Flux; for SD3 the two CLIPs' 77 positions stand before
T5's, and the pooled vector is the two CLIPs' in a row (`components.models.sd3_text_encoders`).

Layout of a store folder: `index.parquet` (one row per image, the empty prompt under image id "")
and shards `text-<number>.safetensors` with tensors `t5` (n, L, D) and `pooled` (n, P). Equal
captions share a record. All L padded positions are kept, because Flux attends to them.

`build_text_store` works shard by shard in a work folder: a shard that is there with the right
fingerprint (captions, encoder, dtype) is not encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.progress import track

INDEX_FILE = "index.parquet"
STORE_VERSION = 1
EMPTY_PROMPT_ID = ""
INDEX_COLUMNS = (
    "image_id",
    "caption_sha256",
    "shard",
    "row",
    "text_tokens",
    "t5_dim",
    "pooled_dim",
    "dtype",
    "encoder_digest",
)
Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


class TextStoreIncomplete(RuntimeError):
    """The folder holds no finished store."""


def caption_sha256(caption: str) -> str:
    """Identity of a caption: SHA-256 of its UTF-8 bytes."""
    return hashlib.sha256(caption.encode("utf-8")).hexdigest()


class TextStore:
    """Read access by image id."""

    def __init__(self, folder: Path) -> None:
        """Open a finished store.

        Raises:
            TextStoreIncomplete: no index (embedding has not finished), or another layout.
        """
        path = folder / INDEX_FILE
        if not path.exists():
            raise TextStoreIncomplete(
                f"{folder}: no {INDEX_FILE}; run the stage `text_embeddings` first"
            )
        self.folder = folder
        self.index = pd.read_parquet(path)
        """One row per image, columns `INDEX_COLUMNS`."""
        missing = [name for name in INDEX_COLUMNS if name not in self.index.columns]
        if missing:
            raise TextStoreIncomplete(f"{path}: columns {missing} are missing; embed again")
        self._place = {
            image_id: (shard, int(row))
            for image_id, shard, row in zip(
                self.index["image_id"], self.index["shard"], self.index["row"], strict=True
            )
        }
        rows = self.index[["image_id", "caption_sha256", "dtype", "encoder_digest"]]
        lines = [json.dumps([str(v) for v in row]) for row in rows.itertuples(index=False)]
        content = "\n".join([f"v{STORE_VERSION}", *sorted(lines)])
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        """SHA-256 over captions and encoder: equal digests mean equal embeddings."""

    def __contains__(self, image_id: object) -> bool:
        """Whether the image has an embedding."""
        return image_id in self._place

    @property
    def widths(self) -> tuple[int, int]:
        """(T5 width D, pooled width P)."""
        first = self.index.iloc[0]
        return int(first["t5_dim"]), int(first["pooled_dim"])

    def read(self, image_id: str) -> tuple[Tensor, Tensor]:
        """Embeddings of one image's caption; id "" is the empty prompt.

        Returns:
            (T5 (L, D), pooled (P,)), float32.

        Raises:
            KeyError: the store has no such image.
        """
        if image_id not in self._place:
            raise KeyError(f"image {image_id} has no text embedding in {self.folder}")
        shard, row = self._place[image_id]
        with safe_open(self.folder / shard, framework="pt") as tensors:
            t5 = tensors.get_slice("t5")[row]
            pooled = tensors.get_slice("pooled")[row]
        return t5.float(), pooled.float()


def build_text_store(
    work: Path,
    destination: Path,
    captions: Mapping[str, str],
    encode: Encode,
    *,
    encoder_digest: str,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int = 16,
    shard_rows: int = 512,
) -> TextStore:
    """Embed captions and publish the store; a killed build goes on with the next shard.

    Args:
        work: private folder that survives a kill.
        destination: folder of the store (other files in it stay).
        captions: caption by image id; the empty prompt is added.
        encode: B prompts to (T5 (B, L, D), pooled (B, P)).
        encoder_digest: identity of the encoder's weights and tokenizers.
        dtype: of the stored embeddings.
        batch_size: prompts per call of `encode`.
        shard_rows: captions per shard; 512 of FLUX.1-dev are 2.1 GB in bfloat16.

    Raises:
        ValueError: an embedding is not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    prompts = {EMPTY_PROMPT_ID: "", **captions}
    # One record per distinct caption, in the order of the smallest image id.
    distinct = list(dict.fromkeys(prompts[image_id] for image_id in sorted(prompts)))
    shards = [distinct[start : start + shard_rows] for start in range(0, len(distinct), shard_rows)]
    places: dict[str, tuple[str, int]] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for number, members in enumerate(track(shards, "text embeddings")):
        name = f"text-{number:05d}.safetensors"
        fingerprint = _fingerprint(members, encoder_digest, dtype)
        if _stored_fingerprint(work / name) != fingerprint:
            _write_shard(work / name, members, encode, batch_size, dtype, fingerprint)
        shapes[name] = _shard_shape(work / name)
        places.update({caption: (name, row) for row, caption in enumerate(members)})
    rows = []
    for image_id in sorted(prompts):
        name, row = places[prompts[image_id]]
        sha = caption_sha256(prompts[image_id])
        rows.append((image_id, sha, name, row, *shapes[name], dtype, encoder_digest))
    index = pd.DataFrame(rows, columns=list(INDEX_COLUMNS))
    _publish(work, destination, sorted(shapes), index)
    return TextStore(destination)


def _fingerprint(captions: list[str], encoder_digest: str, dtype: str) -> str:
    parts = [f"v{STORE_VERSION}", encoder_digest, dtype, *map(caption_sha256, captions)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stored_fingerprint(path: Path) -> str | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as tensors:
        return (tensors.metadata() or {}).get("fingerprint")


def _shard_shape(path: Path) -> tuple[int, int, int]:
    """(L, D, P) of a shard."""
    with safe_open(path, framework="pt") as tensors:
        _, length, width = tensors.get_slice("t5").get_shape()
        return length, width, tensors.get_slice("pooled").get_shape()[1]


def _write_shard(
    path: Path,
    captions: list[str],
    encode: Encode,
    batch_size: int,
    dtype: Literal["float32", "bfloat16"],
    fingerprint: str,
) -> None:
    sequences, vectors = [], []
    for start in range(0, len(captions), batch_size):
        t5, pooled = encode(captions[start : start + batch_size])
        sequences.append(t5.detach().cpu())
        vectors.append(pooled.detach().cpu())
    tensors = {"t5": torch.cat(sequences), "pooled": torch.cat(vectors)}
    for name, tensor in tensors.items():
        bad = (~torch.isfinite(tensor.flatten(1)).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"text embedding {name} of caption {captions[bad[0]][:60]!r} is not finite; "
                "check the text encoders' weights"
            )
    tensors = {k: v.to(getattr(torch, dtype)).contiguous() for k, v in tensors.items()}
    temporary = path.with_name(f".{path.name}")
    save_file(tensors, temporary, metadata={"fingerprint": fingerprint})
    os.replace(temporary, path)


def _publish(work: Path, destination: Path, shards: list[str], index: pd.DataFrame) -> None:
    """Copy (or hard-link) the shards, then the index: a kill leaves no index or a whole store."""
    destination.mkdir(parents=True, exist_ok=True)
    (destination / INDEX_FILE).unlink(missing_ok=True)
    for old in destination.glob("text-*.safetensors"):
        old.unlink()
    for name in shards:
        temporary = destination / f".{name}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(work / name, temporary)
        except OSError:
            shutil.copyfile(work / name, temporary)
        os.replace(temporary, destination / name)
    temporary = destination / f".{INDEX_FILE}"
    index.to_parquet(temporary, index=False)
    os.replace(temporary, destination / INDEX_FILE)
