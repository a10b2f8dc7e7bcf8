"""Drift between two versions of a corpus: have shapes, scores or captions changed in distribution?

PSI (population stability index) is sum (a - b) ln(a / b) over the shares a, b of ten bins of equal
mass in the older version, or of the categories. KS is the largest distance of the two empirical
distribution functions.

Each size is judged twice: it has to pass its bound (with a million rows every difference is
significant) and to be significant (among eleven rows a single one moves KS by 0.09 and PSI by far
more). PSI is tested by Pearson's chi-squared over its own bins or categories, KS by Kolmogorov's
and Smirnov's test, the share of missing values by Pearson's over missing and known, and all of
these together are corrected by Holm. The tests take the two versions for independent samples. Two
versions share most of their rows, so that chance moves them less than the tests allow for: what is
called drift is drift, and among few rows a small change may stay unnamed (`ultraflux corpus diff`
names it row by row).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from components.corpus.manifest_columns import CHARACTERS_ZH, WORDS
from components.corpus.pages.page_figures import histogram, render
from components.statistics.multiple_tests import holm
from components.statistics.two_samples import kolmogorov_smirnov, same_shares

Status = Literal["stable", "too_few_rows", "shifted", "drifted"]
_ORDER: tuple[Status, ...] = ("stable", "too_few_rows", "shifted", "drifted")

_BINS = 10
# A bin that one version lacks: its share counts as this, or PSI would be infinite.
_LEAST_SHARE = 1e-4

_NUMERIC: tuple[tuple[str, str | None], ...] = (
    ("aspect_ratio", None),
    ("megapixels", None),
    ("flat_fraction", None),
    ("entropy_bits", None),
    ("glcm_score", None),
    ("quality_score", "quality_scorer"),
    ("aesthetic", "aesthetic_scorer"),
    ("nsfw_score", "nsfw_scorer"),
    (WORDS, "caption_model"),
    (CHARACTERS_ZH, "translation_model"),
)
_CATEGORICAL = ("bucket", "channel", "is_character", "caption_status", "license", "source")

COLUMNS = (
    "kept",
    *(name for name, _ in _NUMERIC),
    *(scorer for _, scorer in _NUMERIC if scorer is not None),
    *_CATEGORICAL,
)
"""What is compared; see `manifest_columns.read_columns`."""


@dataclass(frozen=True)
class Thresholds:
    """Where a difference gets its name; 0.1 and 0.25 are the customary bounds of PSI."""

    psi_shifted: float = 0.1
    psi_drifted: float = 0.25
    ks_shifted: float = 0.05
    ks_drifted: float = 0.1
    missing_shifted: float = 0.01
    """Change of the share of missing values."""
    significance: float = 0.05
    """Chance of naming anything where nothing has changed, over all features together."""


@dataclass(frozen=True)
class FeatureDrift:
    """One compared feature."""

    name: str
    status: Status
    psi: float | None
    ks: float | None
    missing_before: float
    missing_after: float
    note: str
    p_values: dict[str, float] = field(default_factory=dict)
    """Of `psi`, `ks` and `missing`, as far as there was anything to test; Holm's."""

    @property
    def p_value(self) -> float | None:
        """The smallest of the feature."""
        return min(self.p_values.values(), default=None)


@dataclass(frozen=True)
class DriftReport:
    """All features; the worst status counts."""

    rows_before: int
    rows_after: int
    thresholds: Thresholds
    features: tuple[FeatureDrift, ...]

    @property
    def status(self) -> Status:
        """The worst of all features."""
        return max((f.status for f in self.features), key=_ORDER.index, default="stable")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"status": self.status, **asdict(self)}


def _psi(before: np.ndarray, after: np.ndarray) -> float:
    """PSI of two vectors of counts."""
    a = np.maximum(before / max(before.sum(), 1), _LEAST_SHARE)
    b = np.maximum(after / max(after.sum(), 1), _LEAST_SHARE)
    return float(((b - a) * np.log(b / a)).sum())


def _binned(before: np.ndarray, after: np.ndarray) -> list[np.ndarray]:
    """Counts of two samples, neither empty, in bins of equal mass in the older one."""
    # Distinct ones: a value that fills several tenths (entropy 8.0, one size) has one bin.
    inner = np.unique(np.quantile(before, np.linspace(0, 1, _BINS + 1)[1:-1]))
    return [
        np.bincount(np.searchsorted(inner, values, side="right"), minlength=len(inner) + 1)
        for values in (before, after)
    ]


def population_stability(before: np.ndarray, after: np.ndarray) -> float:
    """PSI of two samples of numbers, neither empty."""
    return _psi(*_binned(before, after))


def _values(table: pd.DataFrame, name: str) -> np.ndarray:
    """Numbers of a feature, NaN where missing or where the table has no such column."""
    if name not in table:
        return np.full(len(table), np.nan)
    return table[name].to_numpy(dtype=float, na_value=np.nan)


def _judged(feature: FeatureDrift, limits: Thresholds) -> FeatureDrift:
    """The feature with its status: the largest difference that is also significant."""
    if feature.status == "drifted":
        return feature
    missing = abs(feature.missing_after - feature.missing_before)
    one_is_empty = feature.psi is None
    sizes = {
        "psi": (feature.psi or 0.0, limits.psi_shifted, limits.psi_drifted),
        "ks": (feature.ks or 0.0, limits.ks_shifted, limits.ks_drifted),
        # All values gone, or new, is more than some.
        "missing": (missing, limits.missing_shifted, 0.0 if one_is_empty else 1.0),
    }
    level = {name: (size > low) + (size > high) for name, (size, low, high) in sizes.items()}
    told = [level[name] for name, p in feature.p_values.items() if p <= limits.significance]
    if any(told):
        return replace(feature, status="shifted" if max(told) == 1 else "drifted")
    return replace(feature, status="too_few_rows" if any(level.values()) else "stable")


def _note(before: pd.DataFrame, after: pd.DataFrame, scorer: str | None) -> str:
    """Scores of different scorers cannot be compared; say so."""
    if scorer is None or scorer not in before or scorer not in after:
        return ""
    names = [sorted(map(str, table[scorer].dropna().unique())) for table in (before, after)]
    if names[0] == names[1]:
        return ""
    return f"{scorer}: {', '.join(names[0]) or 'none'} -> {', '.join(names[1]) or 'none'}"


def _missing_test(known: list[int], rows: list[int]) -> dict[str, float]:
    """p-value of equal shares of missing values; none where no value is missing, or every one."""
    if sum(known) in (0, sum(rows)):
        return {}
    before, after = (np.array([k, n - k]) for k, n in zip(known, rows, strict=True))
    return {"missing": same_shares(before, after)}


def _numeric(
    before: pd.DataFrame, after: pd.DataFrame, name: str, scorer: str | None
) -> FeatureDrift | None:
    values = _values(before, name), _values(after, name)
    known = [v[np.isfinite(v)] for v in values]
    old_nulls, new_nulls = (1 - len(k) / max(len(v), 1) for k, v in zip(known, values, strict=True))
    note = _note(before, after, scorer)
    if not len(known[0]) and not len(known[1]):
        return None
    # Numbers of two scorers are two quantities, however alike their distributions.
    status: Status = "drifted" if note or not len(before) or not len(after) else "stable"
    tests = _missing_test([len(k) for k in known], [len(v) for v in values])
    if not len(known[0]) or not len(known[1]):
        note = note or "one has no values"
        return FeatureDrift(name, status, None, None, old_nulls, new_nulls, note, tests)
    counts = _binned(known[0], known[1])
    ks, p_ks = kolmogorov_smirnov(known[0], known[1])
    tests |= {"psi": same_shares(*counts), "ks": p_ks}
    return FeatureDrift(name, status, _psi(*counts), ks, old_nulls, new_nulls, note, tests)


def _categorical(before: pd.DataFrame, after: pd.DataFrame, name: str) -> FeatureDrift | None:
    if name not in before or name not in after:
        return None
    # By the names that occur: a categorical column lists absent ones too.
    counted = [table[name].value_counts() for table in (before, after)]
    counted = [c[c > 0].rename(index=str).groupby(level=0).sum() for c in counted]
    if counted[0].empty and counted[1].empty:
        return None
    counts = pd.concat(counted, axis=1).fillna(0).sort_index().to_numpy(np.int64)
    names = sorted(set(counted[0].index) | set(counted[1].index))
    new = [label for label, number in zip(names, counts[:, 0], strict=True) if number == 0]
    note = f"new: {', '.join(new[:5])}" if new else ""
    rows = [len(before), len(after)]
    status: Status = "stable" if all(rows) else "drifted"
    known = [int(number) for number in counts.sum(axis=0)]
    old_nulls, new_nulls = (1 - k / max(n, 1) for k, n in zip(known, rows, strict=True))
    tests = _missing_test(known, rows)
    tests |= {"psi": same_shares(counts[:, 0], counts[:, 1])} if len(counts) > 1 else {}
    psi = _psi(counts[:, 0], counts[:, 1])
    return FeatureDrift(name, status, psi, None, old_nulls, new_nulls, note, tests)


def _corrected(features: list[FeatureDrift]) -> list[FeatureDrift]:
    """The same features with p-values corrected for the number of tests."""
    raw = {f"{f.name} {test}": p for f in features for test, p in f.p_values.items()}
    adjusted = holm(raw)
    return [
        replace(f, p_values={test: adjusted[f"{f.name} {test}"] for test in f.p_values})
        for f in features
    ]


def measure_drift(
    before: pd.DataFrame, after: pd.DataFrame, thresholds: Thresholds | None = None
) -> DriftReport:
    """Compare the kept rows of two manifests.

    Features without any value in both versions are left out. Scores of two scorers have drifted
    whatever the numbers say, and so has everything where one version keeps no row.

    Args:
        before: `COLUMNS`, as far as they are known.
        after: the same of the newer version.
        thresholds: see there.
    """
    limits = thresholds or Thresholds()
    old, new = before[before["kept"].eq(True)], after[after["kept"].eq(True)]
    found = [_numeric(old, new, name, scorer) for name, scorer in _NUMERIC]
    found += [_categorical(old, new, name) for name in _CATEGORICAL]
    features = _corrected([feature for feature in found if feature is not None])
    judged = tuple(_judged(feature, limits) for feature in features)
    return DriftReport(len(old), len(new), limits, judged)


def drift_page(report: DriftReport, before: pd.DataFrame, after: pd.DataFrame) -> str:
    """A self-contained HTML page with a histogram per numeric feature."""
    old, new = before[before["kept"].eq(True)], after[after["kept"].eq(True)]
    compared = {feature.name for feature in report.features}
    figures = [
        histogram(
            [("before", _values(old, name)), ("after", _values(new, name))],
            name.replace("_", " "),
            logarithmic=name == "aspect_ratio",
        )
        for name, _ in _NUMERIC
        if name in compared
    ]
    return render("drift.html.j2", report=report, figures=figures)
