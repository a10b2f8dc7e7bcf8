"""What every system under test is: a name, a way to sample, and files that are finished or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from components.evaluation.suites.suites import SuiteItem
from components.generation.image_metadata import read_metadata
from components.generation.sampling import (
    KEY_CHUNK,
    DtypeName,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


class SystemFailed(ValueError):
    """A system did not give what it was asked for; the message says what is missing."""


@dataclass(frozen=True)
class Sampling:
    """How pipelines sample; None is the pipeline's own default."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    dtype: DtypeName = "float32"
    device: str = "cpu"
    memory: str = "none"
    """Modes of `components.models.loading.memory_modes` without text-first, with commas."""


class System(Protocol):
    """Something that is evaluated."""

    @property
    def name(self) -> str:
        """As in tables and file names."""
        ...

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """A file per item, made where it does not exist yet.

        Args:
            items: what is asked for.
            out_dir: folder of this system, for systems that make pictures.

        Raises:
            SystemFailed: pictures are missing or have another size.
            WeightsMissing: the system's weights are not there.
        """
        ...


@runtime_checkable
class Remarking(Protocol):
    """A system that has something to say about the pictures that it gave last."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """A line each, without the system's name."""
        ...


def remarks(system: System) -> tuple[str, ...]:
    """What a reader of the numbers has to know of how the system's pictures came about."""
    return system.remarks if isinstance(system, Remarking) else ()


@dataclass(frozen=True)
class References:
    """The suite's own pictures, as a system: what real photographs score."""

    name: str

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """See `System.pictures`."""
        found = [item.reference for item in items if item.reference is not None]
        if len(found) != len(items):
            raise SystemFailed(f"{self.name}: {len(items) - len(found)} items have no reference")
        return found


def item_key(item: SuiteItem, identity: dict[str, Any]) -> str:
    """sha256 of everything that decides a made picture."""
    values = {
        "prompt": item.prompt,
        "seed": item.seed,
        "height": item.height,
        "width": item.width,
        **identity,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_finished(path: Path, key: str) -> bool:
    """Whether the file is a whole picture with this key in it."""
    try:
        return read_metadata(path).get(KEY_CHUNK) == key
    except ValueError:
        return False
