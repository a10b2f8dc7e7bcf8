"""The one rule by which a row's original is found: its path, else the image store, by its sha256.

`image_id` names bytes and `uri` says where they were at ingest. Whatever is read is hashed, so a
stage depends on the manifest alone: a photograph that was swapped, moved or damaged since ingest
can never enter a result under another's name.
"""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from components.images.image_files import source_bytes
from components.images.image_store import FOLDER, ImageStore, PackedImage

_NAMED_IN_MESSAGES = 3


class OriginalsMissing(ValueError):
    """Originals that are neither at their path nor in the store; one line."""


class OriginalChanged(OSError):
    """Bytes were found, but not the right ones."""


@dataclass(frozen=True)
class Original:
    """One original (picklable); reads like a path."""

    image_id: str
    path: Path
    """Where it was at ingest."""
    packed: PackedImage | None = None
    """Where it is in the store."""

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    def is_there(self) -> bool:
        """Whether a file exists to read it from."""
        return self.path.exists() or (self.packed is not None and self.packed.shard.exists())

    def read_bytes(self) -> bytes:
        """The bytes with the right sha256.

        Raises:
            OSError: they are nowhere to be had; `strerror` says why.
        """
        problem: OSError | None = None
        for place in (self.path, self.packed):
            if place is None:
                continue
            try:
                data = source_bytes(place)
            except OSError as caught:
                # What is wrong with a place that exists says more than that another one is gone.
                if problem is None or not isinstance(caught, FileNotFoundError):
                    problem = caught
                continue
            if hashlib.sha256(data).hexdigest() == self.image_id:
                return data
            where = "the file" if place is self.path else f"image shard {self.packed.shard.name}"  # type: ignore[union-attr]
            advice = "`dvc repro ingest`" if place is self.path else "`dvc checkout data/images`"
            problem = OriginalChanged(
                errno.ESTALE, f"{where} no longer holds these bytes; run {advice}"
            )
        assert problem is not None
        raise problem


class OriginalLookup:
    """Finds originals below a repository root.

    Args:
        root: where a relative `uri` starts; the store is its `data/images`.

    Raises:
        ValueError: the store's index is damaged.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store = ImageStore(root / FOLDER)

    def find_each(self, rows: pd.DataFrame) -> list[Original]:
        """Originals in the order of the rows (columns image_id, uri), there or not."""
        return [
            Original(image_id, self._root / uri, self._store.find(image_id))
            for image_id, uri in zip(rows["image_id"], rows["uri"], strict=True)
        ]

    def find_all(self, rows: pd.DataFrame) -> list[Original]:
        """As `find_each`, and every one exists.

        Raises:
            OriginalsMissing: some exist nowhere.
        """
        found = self.find_each(rows)
        missing = [original for original in found if not original.is_there()]
        if missing:
            names = ", ".join(original.name for original in missing[:_NAMED_IN_MESSAGES])
            raise OriginalsMissing(
                f"{len(missing)} of {len(found)} originals are neither at their path nor in "
                f"{FOLDER} ({names}{', ...' if len(missing) > _NAMED_IN_MESSAGES else ''}); "
                f"`dvc pull {FOLDER}`, or bring them back with `dvc repro -f -s ingest`"
            )
        return found
