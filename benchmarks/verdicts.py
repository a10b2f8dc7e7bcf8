"""What a benchmark says of its targets: ratio, spread over rounds, kept or missed, exit code.

A target is missed when every round is beyond it: what the spread covers is undecided, and is said
to be. `make bench` collects the verdicts of the short benchmarks (`bench.py`).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RESULTS = "ULTRAFLUX_BENCH_RESULTS"
"""Names a file to which verdicts are added, a JSON object a line."""

Outcome = Literal["kept", "undecided", "missed"]


@dataclass(frozen=True)
class Verdict:
    """One ratio, measured in alternation once a round."""

    name: str
    values: tuple[float, ...]
    """One a round, at least one."""
    target: float
    at_most: bool = True
    """Whether the target bounds from above."""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def outcome(self) -> Outcome:
        """`kept` by the median, else `undecided` where some round keeps it, else `missed`."""
        if self._keeps(self.median):
            return "kept"
        return "undecided" if any(map(self._keeps, self.values)) else "missed"

    def _keeps(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target

    def line(self) -> str:
        """For a terminal."""
        bound = "most" if self.at_most else "least"
        return (
            f"{self.name}: {self.median:.3g} ({min(self.values):.3g} to {max(self.values):.3g}, "
            f"n = {len(self.values)}); target at {bound} {self.target:g}: {self.outcome}"
        )


def conclude(verdicts: Sequence[Verdict]) -> int:
    """Print the verdicts and hand them on; 1 where a target is missed."""
    print()
    for verdict in verdicts:
        print(verdict.line())
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if RESULTS in os.environ:
        with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
            for verdict in verdicts:
                row = {
                    "name": verdict.name,
                    "median": round(verdict.median, 4),
                    "low": round(min(verdict.values), 4),
                    "high": round(max(verdict.values), 4),
                    "rounds": len(verdict.values),
                    "target": verdict.target,
                    "at_most": verdict.at_most,
                    "outcome": verdict.outcome,
                    "load": round(os.getloadavg()[0], 1),
                }
                file.write(json.dumps(row) + "\n")
    return int(any(verdict.outcome == "missed" for verdict in verdicts))
