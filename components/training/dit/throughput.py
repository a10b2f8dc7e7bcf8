"""What a training step costs on this machine: images/s, TFLOP/s, memory, and waiting for data.

These numbers depend on the machine, so they go into the metric log and nowhere else: no file that
a stage writes contains them.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from components.training.dit.velocity import NoisedBatch, predict_velocity

WAIT_WARNING = "data_wait_warning"
"""1 in the row of the step at which waiting for data became too long."""
# Left out where two logs are compared for equality.
CHECKPOINT_STALL = "checkpoint_stall_s"
"""How long the step before this one waited for its checkpoint to be taken."""
MACHINE_METRICS = frozenset(
    {
        "images_per_s",
        "step_s",
        "model_tflops_per_s",
        "mfu",
        "data_wait_s",
        "data_wait_share",
        CHECKPOINT_STALL,
        WAIT_WARNING,
        "rss_gib",
        "cuda_allocated_gib",
        "cuda_reserved_gib",
    }
)
"""Metrics that differ between runs with the same results."""
WAIT_LIMIT = 0.05
"""Share of the step above which waiting for data is reported."""
WINDOW_STEPS = 20
_GIB = 2**30


class DataWait:
    """Notices when steps begin to wait for their data."""

    def __init__(self, window: int = WINDOW_STEPS, limit: float = WAIT_LIMIT) -> None:
        """Judge the last `window` steps, as soon as there are so many."""
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self._limit = limit
        self._is_long = False

    @property
    def share(self) -> float:
        """Waiting time over step time in the window, 0 to 1."""
        total = sum(step_s for step_s, _ in self._steps)
        return sum(wait_s for _, wait_s in self._steps) / total if total else 0.0

    def add(self, step_s: float, wait_s: float) -> bool:
        """Count one step; True when the share has just gone above the limit.

        It must fall below the limit before it is reported again.
        """
        # A window, because a single long wait (a shard that is opened) is no bottleneck.
        self._steps.append((step_s, wait_s))
        was_long = self._is_long
        # Not before the window is full: two or three steps say nothing about the disk.
        self._is_long = len(self._steps) == self._steps.maxlen and self.share > self._limit
        return self._is_long and not was_long


class Throughput:
    """Cost of the steps of one run; used by the first rank."""

    def __init__(
        self,
        name: str,
        transformer: Any,
        *,
        images_per_step: int,
        world_size: int,
        peak_tflops: float | None,
        memory_every: int,
    ) -> None:
        """Prepare.

        Args:
            name: of the run, for the warning.
            transformer: the bare model; its class and configuration are used.
            images_per_step: global batch.
            world_size: devices that share it.
            peak_tflops: of a device; None: MFU is not known.
            memory_every: steps between memory readings.
        """
        self._name, self._transformer = name, transformer
        self._images, self._world_size = images_per_step, world_size
        self._peak_tflops, self._memory_every = peak_tflops, memory_every
        # By size, since buckets differ in tokens and attention is quadratic in them.
        self._flops: dict[tuple[int, ...], int] = {}
        self._wait = DataWait()
        self._is_first_step = True

    def measure(
        self, step: int, step_s: float, wait_s: float, batch: NoisedBatch
    ) -> dict[str, float]:
        """Metrics of a finished step.

        Args:
            step: number of steps done.
            step_s: its wall time, waiting included.
            wait_s: of that, until its batch was there.
            batch: a micro batch of it; all have its size.
        """
        # Per device, so that it can be held against the device's own peak.
        tflops = self._flops_per_image(batch) * self._images / step_s / self._world_size / 1e12
        values = {
            "images_per_s": self._images / step_s,
            "step_s": step_s,
            "data_wait_s": wait_s,
            "model_tflops_per_s": tflops,
        }
        if self._peak_tflops is not None:
            # Recomputed activations are not counted: with checkpointing MFU falls, as it should.
            values["mfu"] = tflops / self._peak_tflops
        # Nothing can be loaded ahead of the first step of a process.
        if not self._is_first_step and self._wait.add(step_s, wait_s):
            values[WAIT_WARNING] = 1.0
            print(
                f"{self._name}: step {step}: waiting for data takes {self._wait.share:.0%} of the "
                f"last {WINDOW_STEPS} steps (limit {WAIT_LIMIT:.0%}): put the latent and text "
                "stores on a faster disk, or give the machine free cores",
                file=sys.stderr,
            )
        self._is_first_step = False
        values["data_wait_share"] = self._wait.share
        # Not at every step: asking the system for a process's memory is a call of its own.
        if step % self._memory_every == 0:
            values |= memory_gib(batch_device(self._transformer))
        return values

    def _flops_per_image(self, batch: NoisedBatch) -> int:
        shape = (*batch.latents.shape[1:], batch.text.shape[1])
        # Counting runs the whole architecture on the meta device, so once for every size.
        if shape not in self._flops:
            self._flops[shape] = model_flops(self._transformer, batch)
        return self._flops[shape]


def batch_device(transformer: Any) -> torch.device:
    """Device of a model's parameters."""
    return torch.device(next(transformer.parameters()).device)


def memory_gib(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, on CUDA, peaks of the allocator since the start, GiB."""
    values = {"rss_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        values["cuda_allocated_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        values["cuda_reserved_gib"] = torch.cuda.max_memory_reserved(device) / _GIB
    return values


def model_flops(transformer: Any, batch: NoisedBatch) -> int:
    """Operations of one image forward and backward, without recomputation ("model FLOPs").

    Counted by torch on a copy of the architecture on the meta device: nothing is computed, and
    every backbone is counted the same way. Matrix products and convolutions only, two operations
    per multiply-add; attention as plain products (four in the backward pass).

    Args:
        transformer: the bare model; its class and configuration are used.
        batch: gives the sizes.
    """
    # Entries with an underscore are diffusers' own notes and no arguments.
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        model = type(transformer).from_config(config)
    # One image: operations are linear in the number of images.
    one = NoisedBatch(
        batch.sample_ids[:1],
        *(
            x[:1].to("meta")
            for x in (batch.latents, batch.noise, batch.t, batch.text, batch.pooled)
        ),
    )
    # The architecture of the configuration: adapters, compilation and checkpointing are not in it,
    # so numbers of differently configured runs can be compared.
    with FlopCounterMode(display=False) as counter:
        predict_velocity(model, one, 1.0, torch.float32).sum().backward()
    return int(counter.get_total_flops())
