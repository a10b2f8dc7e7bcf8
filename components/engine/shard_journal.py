"""Finished rows of a shard that is not finished yet: on disk as soon as they are known.

One JSON line per item, [place in the shard, row], so that a killed run repeats no item whose result
had arrived. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class ShardJournal:
    """Rows by place; lives beside its shard until that is written."""

    def __init__(self, shard: Path) -> None:
        """Open nothing yet."""
        self._path = shard.with_suffix(".jsonl")

    def read(self) -> dict[int, dict[str, Any]]:
        """Rows of earlier runs."""
        if not self._path.exists():
            return {}
        data = self._path.read_bytes()
        # A kill may have cut the last line; what is appended next must not continue it.
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return dict(json.loads(line) for line in whole.splitlines())

    def add(self, place: int, row: dict[str, Any]) -> None:
        """Append a row of JSON-able values; floats come back bit for bit."""
        # Opened for each line: closing hands the line to the kernel, which outlives a killed
        # process.
        with self._path.open("ab") as file:
            file.write(json.dumps([place, row]).encode() + b"\n")

    def remove(self) -> None:
        """The shard is written."""
        self._path.unlink(missing_ok=True)
