"""Worker processes that embed captions with the text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.engine.map_items import open_pool
from components.engine.ordered_pool import EngineLimits, Failure
from components.models.backbones import BACKBONES
from components.models.loading.quantisation import quantise
from components.settings.models import Quantisation
from components.training.encoding.encoder_workers import Placement, own_device
from components.training.stores.stored_tensors import StoreDtype
from components.training.stores.text_store import EmbeddedPrompts, embedded_prompts


class EmbeddingFailed(RuntimeError):
    """A batch of captions cannot be embedded, here or by any other worker; one line."""


@dataclass(frozen=True)
class TextJob:
    """Everything a worker needs to embed captions."""

    backbone: str
    """Of `BACKBONES`."""
    folder: str
    """Encoders and tokenizers."""
    max_sequence_length: int
    dtype: StoreDtype
    placement: Placement
    quantisation: Quantisation = "none"


# Loaded by the first batch and kept: loading costs more than many batches.
@cache
def _encoders(job: TextJob) -> Any:
    family = BACKBONES[job.backbone].text_family()
    encoders = family.load(Path(job.folder))
    device = own_device(job.placement)
    for model in family.models(encoders):
        quantise(
            model,
            job.quantisation,
            dtype=torch.float32,
            device=device,
            setting="models.text_encoders.quantisation",
        )
        model.to(device)
    return encoders


def embed_prompts(prompts: list[str], job: TextJob) -> EmbeddedPrompts:
    """Records of a batch of prompts, with the job's networks."""
    # The bits of a sum depend on it, and so would the store.
    torch.set_num_threads(job.placement.threads)

    def encode(batch: list[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            states: tuple[Tensor, Tensor] = (
                BACKBONES[job.backbone]
                .text_family()
                .encode(_encoders(job), batch, job.max_sequence_length)
            )
            return states

    return embedded_prompts(prompts, encode, job.dtype)


def embed_batches(
    plan: Iterable[list[str]], job: TextJob, limits: EngineLimits | None
) -> Iterator[EmbeddedPrompts]:
    """Results of batches of prompts, in order.

    Args:
        plan: batches of prompts.
        job: encoders and where they run.
        limits: of worker processes; None: in this process.

    Raises:
        EmbeddingFailed: a batch fails in every attempt. Unlike a photograph no caption is left out:
            the encoders take any text, so the reason is theirs.
    """
    # The same function as in a worker, so that a store does not tell who embedded it.
    if limits is None:
        for batch in plan:
            yield embed_prompts(batch, job)
        return
    # Results come in the order of the plan, whichever worker is first.
    for result in open_pool(partial(embed_prompts, job=job), limits).map(plan):
        if isinstance(result, Failure):
            raise EmbeddingFailed(f"captions cannot be embedded: {result.message}")
        yield result
