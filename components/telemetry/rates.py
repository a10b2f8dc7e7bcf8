"""What the engine says about its work while it runs: rates, time left, what was turned away."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any


class Throughput:
    """Counts finished rows."""

    def __init__(self, pending: int) -> None:
        """Start the clock.

        Args:
            pending: items that this run has to compute.
        """
        self._pending = pending
        self._images = 0
        self._megapixels = 0.0
        self._problems: Counter[str] = Counter()
        self._started = time.monotonic()

    def see(self, row: Mapping[str, Any]) -> None:
        """Count one finished row, by its pixels (where it knows them) and its problem."""
        self._images += 1
        if row.get("width") and row.get("height"):
            self._megapixels += row["width"] * row["height"] / 1e6
        if row.get("error"):
            self._problems[str(row["error"]).split(":")[0]] += 1
        elif row.get("integrity") not in (None, "ok"):
            self._problems["damaged"] += 1

    def note(self) -> str:
        """Such as "8.1 images/s, 97 MP/s, 0:12:05 left, damaged 3, quarantined 1"."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._images / seconds
        parts = [f"{rate:.1f} images/s"]
        if self._megapixels:
            parts.append(f"{self._megapixels / seconds:.0f} MP/s")
        if rate:
            minutes, left_s = divmod(round((self._pending - self._images) / rate), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{left_s:02} left")
        parts += [f"{reason} {count}" for reason, count in sorted(self._problems.items())]
        return ", ".join(parts)
