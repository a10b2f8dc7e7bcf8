"""Drift between two versions of a corpus: have shapes, scores or captions changed in distribution?

PSI (population stability index) is sum (a - b) ln(a / b) over the shares a, b of ten bins of equal
mass in the older version, or of the categories. KS is the largest distance of the two empirical
distribution functions. With a million rows every difference is significant, so sizes are judged
and not p-values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from components.corpus.pages.page_figures import histogram, render

Status = Literal["stable", "shifted", "drifted"]
_ORDER: tuple[Status, ...] = ("stable", "shifted", "drifted")

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
    ("caption_words", "caption_model"),
    ("caption_characters_zh", "translation_model"),
)
_CATEGORICAL = ("bucket", "channel", "is_character", "caption_status", "license", "source")


@dataclass(frozen=True)
class Thresholds:
    """Where a difference gets its name; 0.1 and 0.25 are the customary bounds of PSI."""

    psi_shifted: float = 0.1
    psi_drifted: float = 0.25
    ks_shifted: float = 0.05
    ks_drifted: float = 0.1
    missing_shifted: float = 0.01
    """Change of the share of missing values."""


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


def population_stability(before: np.ndarray, after: np.ndarray) -> float:
    """PSI of two samples of numbers, neither empty."""
    inner = np.unique(np.quantile(before, np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(inner, values, side="right"), minlength=len(inner) + 1)
        for values in (before, after)
    ]
    return _psi(counts[0], counts[1])


def kolmogorov_smirnov(before: np.ndarray, after: np.ndarray) -> float:
    """Largest distance of the empirical distribution functions of two samples, 0 to 1."""
    a, b = np.sort(before), np.sort(after)
    points = np.concatenate([a, b])
    cdf_a = np.searchsorted(a, points, side="right") / len(a)
    cdf_b = np.searchsorted(b, points, side="right") / len(b)
    return float(np.abs(cdf_a - cdf_b).max())


def _values(table: pd.DataFrame, name: str) -> np.ndarray:
    """Numbers of a feature, NaN where missing."""
    if name == "caption_words":
        words = table["caption_en"].astype("string").str.count(r"\S+")
        return words.to_numpy(dtype=float, na_value=np.nan)
    if name == "caption_characters_zh":
        characters = table["caption_zh"].astype("string").str.len()
        return characters.to_numpy(dtype=float, na_value=np.nan)
    return table[name].to_numpy(dtype=float, na_value=np.nan)


def _status(psi: float, ks: float | None, missing: float, limits: Thresholds) -> Status:
    if psi > limits.psi_drifted or (ks or 0.0) > limits.ks_drifted:
        return "drifted"
    shifted = psi > limits.psi_shifted or (ks or 0.0) > limits.ks_shifted
    return "shifted" if shifted or missing > limits.missing_shifted else "stable"


def _note(before: pd.DataFrame, after: pd.DataFrame, scorer: str | None) -> str:
    """Scores of different scorers cannot be compared; say so."""
    if scorer is None:
        return ""
    names = [sorted(map(str, table[scorer].dropna().unique())) for table in (before, after)]
    if names[0] == names[1]:
        return ""
    return f"{scorer}: {', '.join(names[0]) or 'none'} -> {', '.join(names[1]) or 'none'}"


def _numeric(
    before: pd.DataFrame, after: pd.DataFrame, name: str, scorer: str | None, limits: Thresholds
) -> FeatureDrift | None:
    values = _values(before, name), _values(after, name)
    known = [v[np.isfinite(v)] for v in values]
    old_nulls, new_nulls = (1 - len(k) / max(len(v), 1) for k, v in zip(known, values, strict=True))
    note = _note(before, after, scorer)
    if not len(known[0]) and not len(known[1]):
        return None
    if not len(known[0]) or not len(known[1]):
        return FeatureDrift(
            name, "drifted", None, None, old_nulls, new_nulls, note or "one has no values"
        )
    psi = population_stability(known[0], known[1])
    ks = kolmogorov_smirnov(known[0], known[1])
    status = _status(psi, ks, abs(new_nulls - old_nulls), limits)
    # Numbers of two scorers are two quantities, however alike their distributions.
    return FeatureDrift(name, "drifted" if note else status, psi, ks, old_nulls, new_nulls, note)


def _categorical(
    before: pd.DataFrame, after: pd.DataFrame, name: str, limits: Thresholds
) -> FeatureDrift | None:
    columns = [table[name].dropna().astype(str) for table in (before, after)]
    if columns[0].empty and columns[1].empty:
        return None
    counts = pd.concat([c.value_counts() for c in columns], axis=1).fillna(0).sort_index()
    psi = _psi(counts.iloc[:, 0].to_numpy(float), counts.iloc[:, 1].to_numpy(float))
    old_nulls, new_nulls = (float(table[name].isna().mean()) for table in (before, after))
    new = counts.index[(counts.iloc[:, 0] == 0)].tolist()
    note = f"new: {', '.join(new[:5])}" if new else ""
    status = _status(psi, None, abs(new_nulls - old_nulls), limits)
    return FeatureDrift(name, status, psi, None, old_nulls, new_nulls, note)


def measure_drift(
    before: pd.DataFrame, after: pd.DataFrame, thresholds: Thresholds | None = None
) -> DriftReport:
    """Compare the kept rows of two manifests.

    Features without any value in both versions are left out.
    """
    limits = thresholds or Thresholds()
    old, new = before[before["kept"].eq(True)], after[after["kept"].eq(True)]
    found = [_numeric(old, new, name, scorer, limits) for name, scorer in _NUMERIC]
    found += [_categorical(old, new, name, limits) for name in _CATEGORICAL]
    return DriftReport(len(old), len(new), limits, tuple(f for f in found if f is not None))


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
