"""What changed between two versions of a corpus, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pandas.api.types import union_categoricals

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
VALUES_OF = _KEY
"""Text columns that are needed as they are; of others it is enough where they differ."""
_CAPTIONS = ("caption_en", "caption_zh", "caption_status")


class Columns(Protocol):
    """What is asked of a version: a frame, or a manifest on disk that is read column by column."""

    @property
    def columns(self) -> Any:
        """Names."""

    def __len__(self) -> int:
        """Rows."""

    def __getitem__(self, name: str, /) -> Any:
        """A column."""


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
    coded = all(isinstance(c.dtype, pd.CategoricalDtype) for c in (before, after))
    # A column that is all missing has categories of no text, which unite with no others.
    if coded and before.cat.categories.dtype == after.cat.categories.dtype:
        codes = union_categoricals([before, after]).codes
        return np.asarray(codes[: len(before)] != codes[len(before) :])
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


def _positions(before: Columns, after: Columns) -> np.ndarray:
    """(rows of `after`,) int: where each row is in `before`, -1 where nowhere.

    Raises:
        ValueError: a version has one file with one content twice.
    """
    old, new = before["uri"], after["uri"]
    if old.is_unique:
        same_order = len(old) == len(new) and not _differs(old, new).any()
        # Paths are shorter than hashes, and one look-up is enough.
        found = np.arange(len(old)) if same_order else _look_up(old, new)
        # Paths of two versions are the largest columns; the hashes come next.
        del old, new
        known = np.flatnonzero(found >= 0)
        contents = before["image_id"], after["image_id"]
        if not same_order:
            rows = found[known], known
            contents = tuple(
                c.iloc[at].reset_index(drop=True) for c, at in zip(contents, rows, strict=True)
            )
        found[known[_differs(*contents)]] = -1
        return _once(found, before)
    pairs = [
        pd.MultiIndex.from_arrays([uris.astype(object), version["image_id"].astype(object)])
        for uris, version in ((old, before), (new, after))
    ]
    # One path with two contents may be told apart by the pair; one pair twice may not.
    if not pairs[0].is_unique:
        uri = old.iloc[int(np.flatnonzero(pairs[0].duplicated())[0])]
        raise ValueError(f"the older version has {uri} with the same bytes twice")
    return _once(pairs[0].get_indexer(pairs[1]), before)


def _once(found: np.ndarray, before: Columns) -> np.ndarray:
    """The same positions, none of them for two rows.

    Raises:
        ValueError: see `_positions`.
    """
    twice = np.flatnonzero(np.bincount(found[found >= 0]) > 1)
    if len(twice):
        uri = before["uri"].iloc[int(twice[0])]
        raise ValueError(f"the newer version has {uri} with the same bytes twice")
    return found


def _look_up(among: pd.Series, values: pd.Series) -> np.ndarray:
    """(rows of `values`,) int64: position of each in `among`, -1 where nowhere."""
    # Not pandas' index, which makes an object of every text.
    known, asked = (pa.chunked_array(pa.array(c, pa.large_string())) for c in (among, values))
    found = pc.fill_null(pc.index_in(asked, value_set=known), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64).copy()


def _changed_columns(changed: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """(rows,) text: names of the changed columns of each of `rows`, separated by spaces."""
    codes, labels = np.zeros(len(rows), dtype=np.int64), [""]
    for name, mask in changed.items():
        if mask.any():
            # One more bit, then renumbered, so that no number of columns overflows.
            codes, patterns = pd.factorize(codes * 2 + mask[rows])
            labels = [f"{labels[p // 2]} {name}" if p % 2 else labels[p // 2] for p in patterns]
    return np.array([label.strip() for label in labels], dtype=object)[codes]


def _kept(table: Columns) -> np.ndarray:
    return table["kept"].eq(True).fillna(False).to_numpy(dtype=bool)


def _described(table: Columns, rows: np.ndarray, suffix: str) -> dict[str, Any]:
    """The reject columns of some rows under the names of `DIFF_SCHEMA`."""
    return {
        f"{name}_{suffix}": _plain(table[f"reject_{name}"].iloc[rows])
        for name in ("reason", "value", "threshold")
    }


def _plain(values: pd.Series) -> Any:
    """Values by position; coded text as objects, one for each distinct value."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    return values.array


def _named(table: Columns, rows: np.ndarray) -> dict[str, Any]:
    return {name: table[name].iloc[rows].array for name in ("image_id", "uri")}


def _alone(table: Columns, rows: np.ndarray, change: str, suffix: str) -> pd.DataFrame:
    """Rows that only one version has."""
    return pd.DataFrame(
        {**_named(table, rows), "change": change, **_described(table, rows, suffix)}
    )


def diff(before: Columns, after: Columns) -> CorpusDiff:
    """Compare two manifests row by row.

    A row is one file (`uri`) with one content (`image_id`): a file whose bytes changed is a removed
    row and an added one.

    Args:
        before: older manifest with image_id, uri, kept and the reject columns.
        after: newer manifest; columns that only one of them has are not compared.

    Returns:
        the rows that differ in anything.

    Raises:
        ValueError: a version has one file with one content twice.
    """
    where = _positions(before, after)
    in_both = np.flatnonzero(where >= 0)
    gone = np.ones(len(before), dtype=bool)
    gone[where[in_both]] = False
    same_rows = len(in_both) == len(before) == len(after) and bool((where == in_both).all())

    def differs(name: str) -> np.ndarray:
        """Where a column differs among the rows in both versions."""
        if same_rows:
            return _differs(before[name], after[name])
        return _differs(
            before[name].iloc[where[in_both]].reset_index(drop=True),
            after[name].iloc[in_both].reset_index(drop=True),
        )

    # One column of both versions at a time is in memory, and its mask stays only if it says
    # anything.
    compared = [c for c in after.columns if c in before.columns and c not in _KEY]
    masks = ((name, differs(name)) for name in compared)
    changed = {name: mask for name, mask in masks if mask.any()}
    rows = np.flatnonzero(np.logical_or.reduce([np.zeros(len(in_both), bool), *changed.values()]))
    nothing = np.zeros(len(rows), dtype=bool)
    captions = np.logical_or.reduce(
        [nothing, *(changed[name][rows] for name in _CAPTIONS if name in changed)]
    )
    reasons = changed["reject_reason"][rows] if "reject_reason" in changed else nothing
    left, right = where[in_both[rows]], in_both[rows]
    kept_before, kept_after = _kept(before), _kept(after)
    change = np.select(
        [
            kept_after[right] & ~kept_before[left],
            kept_before[left] & ~kept_after[right],
            reasons,
            captions,
        ],
        ["newly_kept", "newly_rejected", "other_reason", "caption"],
        "values",
    ).astype(object)
    common = pd.DataFrame(
        {
            **_named(after, right),
            "change": change,
            **_described(before, left, "before"),
            **_described(after, right, "after"),
            "columns": _changed_columns(changed, rows),
        }
    )
    parts = [
        common,
        _alone(after, np.flatnonzero(where < 0), "added", "after"),
        _alone(before, np.flatnonzero(gone), "removed", "before"),
    ]
    # Without empty parts, whose columns of nulls would change the others' types.
    found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return CorpusDiff(
        len(before),
        len(after),
        int(kept_before.sum()),
        int(kept_after.sum()),
        found.reindex(columns=DIFF_SCHEMA.names),
    )
