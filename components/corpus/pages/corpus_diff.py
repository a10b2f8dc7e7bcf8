"""What changed between two versions of a corpus, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

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

_KEY = ("uri", "image_id")
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
        found: Counter[str] = Counter()
        # A million rows differ in a handful of sets of columns.
        for names, number in self.rows["columns"].value_counts().items():
            found.update(dict.fromkeys(str(names).split(), int(number)))
        return dict(sorted(found.items()))

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
    """Where two columns of one length differ; missing equals missing."""
    is_text = [isinstance(c.dtype, pd.StringDtype) for c in (before, after)]
    if all(is_text):
        left, right = (pa.chunked_array(pa.array(c, pa.large_string())) for c in (before, after))
        if left.equals(right):
            return np.zeros(len(before), dtype=bool)
        differs = pc.or_(
            pc.fill_null(pc.not_equal(left, right), False),
            pc.xor(pc.is_null(left), pc.is_null(right)),
        )
        return np.asarray(differs.to_numpy(zero_copy_only=False), dtype=bool)
    missing = before.isna().to_numpy(), after.isna().to_numpy()
    if any(is_text) or any(not isinstance(c.dtype, np.dtype) for c in (before, after)):
        before, after = before.astype(object), after.astype(object)
    same = np.asarray(before.to_numpy() == after.to_numpy(), dtype=bool) & ~missing[0] & ~missing[1]
    return ~(same | (missing[0] & missing[1]))


def _positions(before: pd.DataFrame, after: pd.DataFrame) -> np.ndarray:
    """(rows of `after`,) int: where each row is in `before`, -1 where nowhere.

    Raises:
        ValueError: the older version has one file with one content twice.
    """
    if before["uri"].is_unique:
        if len(before) == len(after) and not any(_differs(before[k], after[k]).any() for k in _KEY):
            return np.arange(len(before))
        # Paths are shorter than hashes, and one look-up is enough.
        found = pd.Index(before["uri"]).get_indexer(pd.Index(after["uri"]))
        known = np.flatnonzero(found >= 0)
        other_content = _differs(
            before["image_id"].iloc[found[known]].reset_index(drop=True),
            after["image_id"].iloc[known].reset_index(drop=True),
        )
        found[known[other_content]] = -1
        return found
    old, new = (pd.MultiIndex.from_frame(t[list(_KEY)].astype(object)) for t in (before, after))
    if not old.is_unique:
        uri = before["uri"].iloc[int(np.flatnonzero(old.duplicated())[0])]
        raise ValueError(f"the older version has {uri} with the same bytes twice")
    return old.get_indexer(new)


def _changed_columns(changed: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """(rows,) text: names of the changed columns of each of `rows`, separated by spaces."""
    codes, labels = np.zeros(len(rows), dtype=np.int64), [""]
    for name, mask in changed.items():
        if mask.any():
            # One more bit, then renumbered, so that no number of columns overflows.
            codes, patterns = pd.factorize(codes * 2 + mask[rows])
            labels = [f"{labels[p // 2]} {name}" if p % 2 else labels[p // 2] for p in patterns]
    return np.array([label.strip() for label in labels], dtype=object)[codes]


def _kept(table: pd.DataFrame) -> np.ndarray:
    return table["kept"].eq(True).fillna(False).to_numpy(dtype=bool)


def _described(table: pd.DataFrame, suffix: str) -> dict[str, Any]:
    """The reject columns under the names of `DIFF_SCHEMA`."""
    return {
        f"{name}_{suffix}": table[f"reject_{name}"].array
        for name in ("reason", "value", "threshold")
    }


def _alone(table: pd.DataFrame, change: str, suffix: str) -> pd.DataFrame:
    """Rows that only one version has."""
    return pd.DataFrame(
        {
            "image_id": table["image_id"].array,
            "uri": table["uri"].array,
            "change": change,
            **_described(table, suffix),
        }
    )


def diff(before: pd.DataFrame, after: pd.DataFrame) -> CorpusDiff:
    """Compare two manifests row by row.

    A row is one file (`uri`) with one content (`image_id`): a file whose bytes changed is a removed
    row and an added one.

    Args:
        before: older manifest with image_id, uri, kept and the reject columns.
        after: newer manifest; columns that only one of them has are not compared.

    Returns:
        the rows that differ in anything.

    Raises:
        ValueError: the older version has one file with one content twice.
    """
    where = _positions(before, after)
    in_both = np.flatnonzero(where >= 0)
    gone = np.ones(len(before), dtype=bool)
    gone[where[in_both]] = False

    def pair(name: str) -> tuple[pd.Series, pd.Series]:
        """A column of the rows in both versions, older and newer."""
        if len(in_both) == len(before) == len(after) and (where == in_both).all():
            return before[name], after[name]
        return before[name].iloc[where[in_both]], after[name].iloc[in_both]

    compared = [c for c in after.columns if c in before.columns and c not in _KEY]
    changed = {name: _differs(*pair(name)) for name in compared}
    rows = np.flatnonzero(np.logical_or.reduce([np.zeros(len(in_both), bool), *changed.values()]))
    left, right = before.iloc[where[in_both[rows]]], after.iloc[in_both[rows]]
    captions = np.zeros(len(rows), dtype=bool)
    for name in _CAPTIONS:
        if name in changed:
            captions |= changed[name][rows]
    kept_before, kept_after = _kept(left), _kept(right)
    change = np.select(
        [
            kept_after & ~kept_before,
            kept_before & ~kept_after,
            changed["reject_reason"][rows],
            captions,
        ],
        ["newly_kept", "newly_rejected", "other_reason", "caption"],
        "values",
    )
    common = pd.DataFrame(
        {
            "image_id": right["image_id"].array,
            "uri": right["uri"].array,
            "change": change,
            **_described(left, "before"),
            **_described(right, "after"),
            "columns": _changed_columns(changed, rows),
        }
    )
    parts = [
        common,
        _alone(after[where < 0], "added", "after"),
        _alone(before[gone], "removed", "before"),
    ]
    found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return CorpusDiff(
        len(before),
        len(after),
        int(_kept(before).sum()),
        int(_kept(after).sum()),
        found.reindex(columns=DIFF_SCHEMA.names),
    )
