"""Where the workers that encode photographs and captions run, and which GPU each one takes.

The parent appends results in the order of its plan, so a store has the same bytes however many
workers there are. Networks are loaded by the first batch of a worker and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from components.engine.ordered_pool import EngineLimits
from components.files.holder_locks import claim_first
from components.settings.schema import Settings

_TIMEOUT_S = 1800.0
"""Per batch, loading the network included; the largest VAE needs minutes on a slow disk."""
_MEMORY_MB = 2**24
"""CUDA reserves address space freely."""


def encoder_limits(settings: Settings, pretrained: str | None) -> EngineLimits | None:
    """Where encoders run; None: in the process of the stage.

    On a CPU one worker process, or several with a tiny network, would only add the seconds that
    each takes to import torch.

    Args:
        settings: their `runtime` decides.
        pretrained: folder of the encoders; None: the tiny random ones.
    """
    runtime = settings.runtime
    is_small = runtime.workers == 1 or pretrained is None
    if runtime.engine == "local" and runtime.device == "cpu" and is_small:
        return None
    limits = EngineLimits.for_networks(settings, timeout_s=_TIMEOUT_S, memory_mb=_MEMORY_MB)
    if runtime.engine == "local" and runtime.device == "cuda":
        # By GPUs and not by cores: each worker holds a network of its own in a GPU's memory.
        return replace(limits, workers=max(1, torch.cuda.device_count()) * runtime.encoders_per_gpu)
    return limits


def claim_slot(folder: Path, slots: int) -> int:
    """A number below `slots` that no living process holds under `folder`, kept until this one ends.

    The lock belongs to the process, so a worker that is killed gives its slot back at once.

    Raises:
        RuntimeError: every slot is taken.
    """
    files = [folder / f"slot-{slot}" for slot in range(slots)]
    claimed = claim_first(files)
    if claimed is None:
        raise RuntimeError(f"all {slots} encoder slots in {folder} are taken by living processes")
    return files.index(claimed)


@dataclass(frozen=True)
class Placement:
    """Where the workers of one stage compute."""

    device: Literal["cpu", "cuda"]
    threads: int
    """Intra-op threads; sums depend on it bit for bit."""
    slots: str | None
    """Folder of `claim_slot`, for several workers that share this machine's GPUs; None: the first
    visible device (Ray shows every actor its own)."""

    @classmethod
    def of(cls, settings: Settings, work_dir: Path) -> Placement:
        """As the settings say; `work_dir` is private to the stage."""
        runtime = settings.runtime
        # Elsewhere Ray divides the GPUs, and slots would divide them once more.
        shares = runtime.engine == "local" and runtime.device == "cuda"
        return cls(
            runtime.device, runtime.torch_threads, str(work_dir / "slots") if shares else None
        )


# Once a process: a second claim would take a second slot and perhaps another GPU.
@cache
def own_device(placement: Placement) -> torch.device:
    """Device of this worker: neighbouring workers get different GPUs."""
    if placement.device == "cpu" or placement.slots is None:
        return torch.device(placement.device)
    gpus = torch.cuda.device_count()
    # Room for a worker that is being replaced while its predecessor still ends.
    return torch.device("cuda", claim_slot(Path(placement.slots), 64 * gpus) % gpus)
