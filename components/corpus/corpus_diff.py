"""What changed between two versions of a corpus, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

CHANGES = (
    "added",
    "removed",
    "newly_kept",
    "newly_rejected",
    "other_reason",
    "caption",
    "values",
)
"""What can happen to a row; the first that applies is its `change`."""

DIFF_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("change", pa.string()),
        ("reason_before", pa.string()),
        ("value_before", pa.float64()),
        ("threshold_before", pa.float64()),
        ("reason_after", pa.string()),
        ("value_after", pa.float64()),
        ("threshold_after", pa.float64()),
        # Names of the columns whose values differ, separated by spaces.
        ("columns", pa.string()),
    ]
)

_DECISIONS = ("kept", "reject_reason", "reject_value", "reject_threshold", "split")
_CAPTIONS = ("caption_en", "caption_zh", "caption_status")


@dataclass(frozen=True)
class CorpusDiff:
    """All differing rows, and how many of each kind."""

    rows_before: int
    rows_after: int
    kept_before: int
    kept_after: int
    rows: pd.DataFrame
    """Columns of `DIFF_SCHEMA`, in the order of the second version, removed rows last."""

    def counts(self) -> dict[str, int]:
        """Rows per kind of change, zeros included."""
        found = self.rows["change"].value_counts()
        return {change: int(found.get(change, 0)) for change in CHANGES}

    def by_rule(self) -> dict[str, dict[str, int]]:
        """Newly rejected rows by their rule, newly kept ones by the rule that held before."""
        groups = {"newly_kept": "reason_before", "newly_rejected": "reason_after"}
        found: dict[str, dict[str, int]] = {}
        for change, column in groups.items():
            rules = self.rows.loc[self.rows["change"] == change, column].fillna("unknown")
            counts = rules.value_counts().sort_index()
            found[change] = {str(rule): int(count) for rule, count in counts.items()}
        return found

    def by_column(self) -> dict[str, int]:
        """Rows present in both versions whose value in a column differs."""
        names = self.rows["columns"].dropna().str.split(" ").explode()
        return {str(k): int(v) for k, v in names[names != ""].value_counts().sort_index().items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, as plain values."""
        return {
            "rows": [self.rows_before, self.rows_after],
            "kept": [self.kept_before, self.kept_after],
            "changes": self.counts(),
            "rules": self.by_rule(),
            "columns": self.by_column(),
        }


def _differs(before: pd.Series, after: pd.Series) -> np.ndarray:
    """Where two columns differ; missing equals missing."""
    missing = before.isna().to_numpy(), after.isna().to_numpy()
    same = (before.to_numpy(dtype=object) == after.to_numpy(dtype=object)) & ~missing[0]
    return ~(same | (missing[0] & missing[1]))


def _kept(table: pd.DataFrame) -> np.ndarray:
    return table["kept"].eq(True).fillna(False).to_numpy(dtype=bool)


def _described(table: pd.DataFrame, suffix: str) -> dict[str, Any]:
    """The reject columns under the names of `DIFF_SCHEMA`."""
    return {
        f"{name}_{suffix}": table[f"reject_{name}"].to_numpy()
        for name in ("reason", "value", "threshold")
    }


def diff(before: pd.DataFrame, after: pd.DataFrame) -> CorpusDiff:
    """Compare two manifests row by row.

    A row is one file (`uri`) with one content (`image_id`): a file whose bytes changed is a removed
    row and an added one.

    Args:
        before: older manifest with image_id, uri, kept and the reject columns.
        after: newer manifest; columns that only one of them has are not compared.

    Returns:
        the rows that differ in anything.
    """
    old = pd.MultiIndex.from_frame(before[["uri", "image_id"]].astype(object))
    new = pd.MultiIndex.from_frame(after[["uri", "image_id"]].astype(object))
    where = old.get_indexer(new)
    added = after[where < 0]
    gone = np.ones(len(before), dtype=bool)
    gone[where[where >= 0]] = False
    left, right = before.iloc[where[where >= 0]], after[where >= 0]

    columns = np.full(len(right), "", dtype=object)
    changed: dict[str, np.ndarray] = {}
    for name in (c for c in after.columns if c in before.columns and c not in ("uri", "image_id")):
        changed[name] = _differs(left[name], right[name])
        columns[changed[name]] += f"{name} "
    any_change = columns != ""
    captions = np.logical_or.reduce(
        [changed[c] for c in _CAPTIONS if c in changed] or [~any_change]
    )
    kept_before, kept_after = _kept(left), _kept(right)
    change = np.select(
        [kept_after & ~kept_before, kept_before & ~kept_after, changed["reject_reason"], captions],
        ["newly_kept", "newly_rejected", "other_reason", "caption"],
        "values",
    )
    common = pd.DataFrame(
        {
            "image_id": right["image_id"].to_numpy(),
            "uri": right["uri"].to_numpy(),
            "change": change,
            **_described(left, "before"),
            **_described(right, "after"),
            "columns": pd.Series(columns, dtype=object).str.rstrip(),
        }
    )[any_change]
    parts = [common]
    for rows, kind, suffix in ((added, "added", "after"), (before[gone], "removed", "before")):
        parts.append(
            pd.DataFrame(
                {
                    "image_id": rows["image_id"].to_numpy(),
                    "uri": rows["uri"].to_numpy(),
                    "change": kind,
                    **_described(rows, suffix),
                }
            )
        )
    found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return CorpusDiff(
        len(before),
        len(after),
        int(_kept(before).sum()),
        int(_kept(after).sum()),
        found.reindex(columns=DIFF_SCHEMA.names),
    )
