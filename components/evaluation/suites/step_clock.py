"""When each denoising step of a diffusers pipeline ends."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from components.evaluation.suites.suites import SuiteItem


@dataclass(frozen=True)
class PipelinePaint:
    """Makes one picture of an item, and shows the pipeline that does it."""

    pipeline: Any
    """A loaded diffusers pipeline; its scheduler steps once per denoising step."""
    make: Callable[[SuiteItem], Image.Image]

    def __call__(self, item: SuiteItem) -> Image.Image:
        """The picture."""
        return self.make(item)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


@contextmanager
def step_ends(paint: object, device: str) -> Iterator[list[float]]:
    """Seconds of a monotonic clock at which the steps of pictures made in the block ended.

    The difference of two neighbours of one picture is a step: a pass of the network and the
    scheduler, without text encoding and decoding. Empty for what shows no scheduler.

    Args:
        paint: makes pictures; see `PipelinePaint`.
        device: where it does.
    """
    ends: list[float] = []
    scheduler = getattr(getattr(paint, "pipeline", None), "scheduler", None)
    if scheduler is None:
        yield ends
        return
    step = scheduler.step

    # Pipelines look at the parameters of `step`, which `wraps` keeps.
    @functools.wraps(step)
    def timed(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        synchronise(device)
        ends.append(time.perf_counter())
        return result

    scheduler.step = timed
    try:
        yield ends
    finally:
        del scheduler.step
