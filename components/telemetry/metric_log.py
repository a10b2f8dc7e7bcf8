"""Metrics over steps in a JSONL file: written first, uploaded by whoever wants to, later.

Training never waits for a tracking server: one line `{"step": 10, "time_ms": 1763733600000,
"loss": 0.5}` is appended and flushed. A resumed run calls `rewind` so that every step stands in the
file once. The time belongs to the line and not to the upload, so that a line sent twice is one
point.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from components.files.whole_files import write_text

TIME_KEY = "time_ms"
"""Wall clock of a line in ms since 1970; part of the file, not of `rows`."""


class MetricLog:
    """Append-only metrics of one run."""

    def __init__(self, path: Path) -> None:
        """Open (and create) `path`; existing lines stay."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not where it is there: a reader must not make it look as if the run were at work.
        if not path.exists():
            path.touch()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the `metrics` of one `step` (at least 0); a NaN is recorded as it is."""
        stamp = {"step": step, TIME_KEY: int(time.time() * 1000)}
        line = json.dumps(stamp | {name: float(v) for name, v in metrics.items()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> Iterator[dict[str, float]]:
        """Complete lines in the order written; one cut off by a kill, or damaged, is left out."""
        for row in self._lines():
            row.pop(TIME_KEY, None)
            yield row

    def _lines(self) -> Iterator[dict[str, float]]:
        # Bytes that are no text spoil their own line alone, like any other that is damaged.
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                # What is left of a line can still be a number or a string.
                if isinstance(row, dict) and "step" in row:
                    yield row

    def rewind(self, step: int) -> None:
        """Forget everything logged at steps greater than `step` (resume from a checkpoint)."""
        kept = [row for row in self._lines() if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, finite values only."""
        pairs = [(int(row["step"]), row[name]) for row in self.rows() if name in row]
        finite = [(step, value) for step, value in pairs if math.isfinite(value)]
        return [step for step, _ in finite], [value for _, value in finite]
