"""Worker processes that encode photographs with the base autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from components.engine.map_items import open_pool
from components.engine.ordered_pool import EngineLimits, Failure
from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder
from components.settings.models import AutoencoderSettings
from components.training.distributed.ranks import deterministic_torch
from components.training.encoding.encoder_workers import Placement, own_device
from components.training.encoding.latents import EncodedBatch, EncodingItem, Posterior, encode_batch
from components.training.stores.stored_tensors import StoreDtype


@dataclass(frozen=True)
class LatentJob:
    """Everything a worker needs to encode photographs."""

    autoencoder: AutoencoderSettings
    seed: int
    root: str
    """Repository; where a relative weights folder starts."""
    digest: str
    """Of the encoder that the parent loaded."""
    dtype: StoreDtype
    max_megapixels: float
    posterior: Posterior
    placement: Placement


# Loaded by the first batch and kept: loading costs more than many batches.
@cache
def _autoencoder(job: LatentJob) -> Any:
    """The job's network on this worker's device.

    Raises:
        ValueError: this machine's weights are not those of the parent.
    """
    model = load_base_autoencoder(job.autoencoder, job.seed, Path(job.root))
    # The index names the parent's encoder for every record, so no other may make any.
    if (found := encoder_digest(model)) != job.digest:
        raise ValueError(
            f"models.autoencoder.pretrained: encoder {found[:12]} here, {job.digest[:12]} where "
            "the stage runs; put the same weights on every machine"
        )
    return model.to(own_device(job.placement))


def encode_photographs(items: list[EncodingItem], job: LatentJob) -> EncodedBatch:
    """Body of a worker: `encode_batch` with the job's network."""
    # As in the stage's own process, so that a store does not tell who encoded it.
    with deterministic_torch(job.placement.threads):
        return encode_batch(items, _autoencoder(job), job.dtype, job.max_megapixels, job.posterior)


def latent_workers(
    job: LatentJob, limits: EngineLimits
) -> Callable[[Iterable[list[EncodingItem]]], Iterator[EncodedBatch | Failure]]:
    """What `encode_corpus` takes as `workers`."""
    return open_pool(partial(encode_photographs, job=job), limits).map
