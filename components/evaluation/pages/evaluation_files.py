"""What `ultraflux evaluate` left in a folder, read and checked."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from components.evaluation.statistics.set_comparison import SetComparison
from components.metrics.cards import CARDS
from components.metrics.metric_card import MetricCard


class EvaluationIncomplete(ValueError):
    """A folder without what `ultraflux evaluate` writes; one line with the fix."""


@dataclass(frozen=True)
class Evaluation:
    """What `ultraflux evaluate` wrote."""

    suite: str
    protocol: str
    items: int
    metrics: dict[str, float]
    unavailable: dict[str, str]
    failed_systems: dict[str, str]
    table: pd.DataFrame
    scores_sha256: str
    pictures: list[dict[str, str]]
    set_comparisons: tuple[SetComparison, ...] = ()
    """Of `ultraflux evaluate --baseline NAME`."""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By system: pictures of each measured size."""
    other_sizes: dict[str, str] = field(default_factory=dict)
    """Systems that were not measured at the suite's sizes, and how."""
    notes: tuple[str, ...] = ()
    """How pictures were matched, read and taken over."""

    @property
    def systems(self) -> tuple[str, ...]:
        """Names in the order in which they were evaluated."""
        return tuple(dict.fromkeys(picture["system"] for picture in self.pictures))

    @property
    def image_metrics(self) -> list[MetricCard]:
        """Cards of metrics with a value of some picture, in the order of the cards."""
        known = set(self.table.loc[self.table["value"].notna(), "metric"])
        return [c for c in CARDS if c.id in known]

    @property
    def measured(self) -> list[str]:
        """Ids with a number for some system, in the order of the cards."""
        endings = {name.rsplit(".", 1)[-1] for name in self.metrics}
        names = endings | {name.removesuffix("_infinite") for name in endings}
        return [c.id for c in CARDS if c.id in names]


def read_evaluation(folder: Path) -> Evaluation:
    """What `ultraflux evaluate` left in `folder`.

    Raises:
        EvaluationIncomplete: a file is missing or not readable.
    """
    try:
        description = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        scores = (folder / "scores.parquet").read_bytes()
        # Only "\n" ends a line: splitlines() would also split at separators inside a prompt.
        lines = (folder / "pictures.jsonl").read_text(encoding="utf-8").split("\n")
        table = pd.read_parquet(io.BytesIO(scores))
        digest = hashlib.sha256(scores).hexdigest()
        if description.get("scores_sha256", digest) != digest:
            raise ValueError("scores.parquet is of another run than metrics.json")
        return Evaluation(
            suite=description["suite"],
            protocol=description["protocol"],
            items=int(description["items"]),
            metrics={k: v for k, v in description["metrics"].items() if v is not None},
            unavailable=description["unavailable"],
            failed_systems=description["failed_systems"],
            table=table,
            scores_sha256=digest,
            pictures=[dict(json.loads(line)) for line in lines if line.strip()],
            set_comparisons=tuple(
                SetComparison(**one) for one in description.get("set_comparisons", ())
            ),
            sizes=description.get("sizes", {}),
            other_sizes=description.get("other_sizes", {}),
            notes=tuple(description.get("notes", ())),
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as problem:
        detail = f"{problem.strerror}" if isinstance(problem, OSError) else f"{problem}"
        name = Path(str(getattr(problem, "filename", "") or "")).name
        raise EvaluationIncomplete(
            f"{folder}: not an evaluation ({name + ': ' if name else ''}{detail}); make one with "
            "ultraflux evaluate SUITE --system NAME=SPEC --out FOLDER"
        ) from None
