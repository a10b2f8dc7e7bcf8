"""Text embeddings of a corpus: a sequence of states and a pooled CLIP vector per caption.

The states (stored as `t5`) are T5's for Flux; what stands before T5's for another backbone, and how
several CLIPs share the pooled vector, its text encoders say (`Backbone.text_family`).

Layout of a store folder: `index.parquet` (one row per image, the empty prompt under image id ""),
`store.json` (provenance of the encoders) and shards `text-<number>.bin` of fixed-size records: the
states (L, D), then the pooled vector (P), little-endian. Equal captions share a record. All L
padded positions are kept, because Flux attends to them.

`build_text_store` appends to a work folder batch by batch; a killed build goes on with the next
batch and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from components.telemetry.progress import track
from components.training.stores.record_reader import Verify
from components.training.stores.record_store import RecordStore, StoreKind, StoreWriter
from components.training.stores.stored_tensors import StoreDtype, to_record

# No image has an empty id, and it sorts before all others.
EMPTY_PROMPT_ID = ""
INDEX_COLUMNS = (
    "image_id",
    "caption_sha256",
    "shard",
    "offset",
    "nbytes",
    "xxh64",
    "text_tokens",
    "t5_dim",
    "pooled_dim",
    "dtype",
    "encoder_digest",
)
Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


class TextStoreIncomplete(RuntimeError):
    """The folder holds no finished store."""


class TextCorrupt(RuntimeError):
    """A record whose bytes are not the ones that were written; names shard and image."""


KIND = StoreKind(
    name="text embeddings",
    record="text embedding",
    stage="text_embeddings",
    version=2,
    columns=INDEX_COLUMNS,
    # What decides an embedding, so that equal digests mean equal embeddings.
    identity=("image_id", "caption_sha256", "dtype", "encoder_digest"),
    incomplete=TextStoreIncomplete,
    corrupt=TextCorrupt,
)


@dataclass(frozen=True)
class EmbeddedPrompts:
    """What the store keeps of a few prompts; small enough to travel between processes."""

    records: list[bytes]
    """Per prompt: states, then pooled vector."""
    shape: tuple[int, int, int]
    """(L, D, P)."""


EncodeBatches = Callable[[Iterable[list[str]]], Iterator[EmbeddedPrompts]]


def caption_sha256(caption: str) -> str:
    """Identity of a caption: SHA-256 of its UTF-8 bytes."""
    return hashlib.sha256(caption.encode("utf-8")).hexdigest()


class TextStore(RecordStore):
    """Read access by image id; every read is verified unless told otherwise.

    `index` has one row per image, columns `INDEX_COLUMNS`, and one for the empty prompt; `about`
    holds the `provenance` of the encoders.
    """

    kind = KIND

    def __init__(self, folder: Path, *, verify: Verify = "always") -> None:
        """Open a finished store.

        Args:
            folder: of the store.
            verify: when record hashes are compared, as in `RecordReader`.

        Raises:
            TextStoreIncomplete: no index (embedding has not finished), or another layout.
        """
        super().__init__(folder, verify=verify)
        # Padded to one length, so that the first row speaks for all.
        first = self.index.iloc[0]
        self._shape = tuple(int(first[name]) for name in ("text_tokens", "t5_dim", "pooled_dim"))
        self._dtype: torch.dtype = getattr(torch, str(first["dtype"]))

    @property
    def widths(self) -> tuple[int, int]:
        """(T5 width D, pooled width P)."""
        return self._shape[1], self._shape[2]

    @property
    def tokens(self) -> int:
        """Text tokens L of every record."""
        return self._shape[0]

    def read(self, image_id: str) -> tuple[Tensor, Tensor]:
        """Embeddings of one image's caption; id "" is the empty prompt.

        Returns:
            (T5 (L, D), pooled (P,)), float32.

        Raises:
            KeyError: the store has no such image.
            TextCorrupt: the record is cut off or its hash differs.
        """
        t5, pooled = self.read_batch([image_id])
        return t5[0], pooled[0]

    def read_batch(self, image_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of B images' captions, (T5 (B, L, D), pooled (B, P)), float32.

        Raises:
            KeyError: the store has no such image.
            TextCorrupt: a record is cut off or its hash differs.
        """
        t5, pooled = self.read_stored(image_ids)
        return t5.float(), pooled.float()

    def read_stored(
        self, image_ids: Sequence[str], *, pin_memory: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`read_batch` in the stored precision: two views of one buffer.

        Args:
            image_ids: B images.
            pin_memory: page-lock the buffer, so that its copy to a GPU does not block.
        """
        rows = self._rows_of(image_ids)
        tokens, width, pooled = self._shape
        # Both parts in one record: a sample is one read, and one hash covers it.
        states = tokens * width
        buffer = torch.empty((len(rows), states + pooled), dtype=self._dtype, pin_memory=pin_memory)
        self._read_into(rows, buffer)
        # Views with a stride of the whole record; nothing is copied here.
        return buffer[:, :states].unflatten(1, (tokens, width)), buffer[:, states:]


def embedded_prompts(prompts: list[str], encode: Encode, dtype: StoreDtype) -> EmbeddedPrompts:
    """Encode B prompts into records.

    Raises:
        ValueError: an embedding is not finite.
    """
    t5, pooled = (tensor.detach().cpu() for tensor in encode(prompts))
    for name, tensor in (("t5", t5), ("pooled", pooled)):
        # Before anything is stored: found later, it would be a loss that is NaN.
        bad = (~torch.isfinite(tensor.flatten(1)).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"text embedding {name} of caption {prompts[bad[0]][:60]!r} is not finite; "
                "check the text encoders' weights"
            )
    records = [
        to_record(one, dtype) + to_record(two, dtype) for one, two in zip(t5, pooled, strict=True)
    ]
    return EmbeddedPrompts(records, (t5.shape[1], t5.shape[2], pooled.shape[1]))


def build_text_store(
    work: Path,
    destination: Path,
    captions: Mapping[str, str],
    encode_batches: EncodeBatches,
    *,
    encoder_digest: str,
    dtype: StoreDtype,
    batch_size: int = 16,
    shard_mb: float = 2048,
    provenance: Mapping[str, Any] | None = None,
) -> TextStore:
    """Embed captions and publish the store; a killed build goes on with the next batch.

    Args:
        work: private folder that survives a kill.
        destination: folder of the store (other files in it stay).
        captions: caption by image id; the empty prompt is added.
        encode_batches: results of lists of prompts, in their order (`embedded_prompts`).
        encoder_digest: identity of the encoder's weights and tokenizers.
        dtype: of the stored embeddings.
        batch_size: prompts per list.
        shard_mb: a shard takes no further record beyond this size in MiB.
        provenance: how the embeddings were made, JSON-able.
    """
    # The empty prompt is what classifier-free guidance contrasts with.
    prompts = {EMPTY_PROMPT_ID: "", **captions}
    # One record per distinct caption, in the order of the smallest image id.
    distinct = list(dict.fromkeys(prompts[image_id] for image_id in sorted(prompts)))
    plan = [distinct[at : at + batch_size] for at in range(0, len(distinct), batch_size)]
    shas = {caption: caption_sha256(caption) for caption in distinct}
    # The plan decides what shares a batch, so work under another plan is not continued.
    listed = hashlib.sha256(f"{batch_size}\n".encode() + "\n".join(shas.values()).encode())
    writer = StoreWriter(
        KIND,
        work,
        key="caption_sha256",
        dtype=dtype,
        encoder_digest=encoder_digest,
        shard_mb=shard_mb,
        # Without it a work folder of other captions would be gone on with.
        depends_on={"captions": listed.hexdigest()},
    )
    records = writer.records
    stored = records.stored()
    # A batch is stored whole or not at all, so its first caption speaks for it.
    pending = [batch for batch in plan if shas[batch[0]] not in stored]
    # Nothing to do must not start workers that load encoders.
    results = encode_batches(pending) if pending else iter(())
    tracked = track(results, "text embeddings", total=len(plan), initial=len(plan) - len(pending))
    for batch, embedded in zip(pending, tracked, strict=True):
        names = ("text_tokens", "t5_dim", "pooled_dim")
        shape = dict(zip(names, embedded.shape, strict=True))
        rows = [{"caption_sha256": shas[caption], **shape} for caption in batch]
        records.append("text", rows, embedded.records)
    images = sorted(prompts)
    samples = pd.DataFrame(
        {"image_id": images, "caption_sha256": [shas[prompts[one]] for one in images]}
    )
    # Many images to one record: equal captions share it.
    index = samples.merge(pd.DataFrame(records.rows), on="caption_sha256", how="left")
    writer.publish(destination, index, provenance)
    return TextStore(destination)
