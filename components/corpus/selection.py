"""Selection: a pure function from the table of signals to kept and rejected rows.

Signals are measured once; thresholds can change and the table is judged again in seconds. A
rejected row names the first rule that it fails, its value and the threshold.
"""

from __future__ import annotations

import math

import pandas as pd

from components.corpus.settings import SelectSettings

REASONS = (
    "integrity",
    "duplicate",
    "resolution",
    "flat_fraction",
    "entropy",
    "quality",
    "aesthetic",
)
"""Rules in the order in which they are tried; the first that fails is the reason.

Free checks come before measured ones and those before model scores. The aesthetic percentile is
taken last, among the images that pass everything else, as the paper's filters follow one another.
"""

SETTING_OF = {
    "integrity": "ingest.source",
    "duplicate": "ingest.source",
    "resolution": "select.min_pixels",
    "flat_fraction": "select.max_flat_fraction",
    "entropy": "select.min_entropy_bits",
    "quality": "select.min_quality",
    "aesthetic": "select.aesthetic_top_fraction",
}
"""The setting to look at when a rule rejects too much."""


class _Verdicts:
    """The reject columns of a growing set of rejected rows."""

    def __init__(self, index: pd.Index) -> None:
        self.reason = pd.Series(None, index=index, dtype=object)
        self.value = pd.Series(math.nan, index=index, dtype=float)
        self.threshold = pd.Series(math.nan, index=index, dtype=float)

    @property
    def passing(self) -> pd.Series:
        return self.reason.isna()

    def reject(
        self, fails: pd.Series, reason: str, values: pd.Series | None, threshold: float | None
    ) -> None:
        """Reject the rows where `fails`, unless an earlier rule did."""
        rows = fails & self.passing
        self.reason[rows] = reason
        if values is not None:
            self.value[rows] = values[rows].astype(float)
        if threshold is not None:
            self.threshold[rows] = threshold


def _aesthetic_threshold(scores: pd.Series, top_fraction: float) -> float:
    """The score of the last image inside the top fraction; at least one image is inside."""
    ranked = scores.dropna().sort_values(ascending=False)
    if ranked.empty:
        return math.nan
    inside = min(len(ranked), max(1, math.ceil(top_fraction * len(scores))))
    return float(ranked.iloc[inside - 1])


def select(table: pd.DataFrame, settings: SelectSettings) -> pd.DataFrame:
    """Apply the paper's rules (UltraFlux supplement 2.1).

    Kept: width * height >= min_pixels, flat_fraction <= max_flat_fraction, entropy_bits >=
    min_entropy_bits, quality_score > min_quality (if set), and aesthetic among the top fraction of
    what is left (ties at the border are kept; 1.0 switches the rule off). A signal that is missing
    fails its rule, with a null value.

    Args:
        table: manifest columns integrity, duplicate_of, width, height, flat_fraction, entropy_bits,
            quality_score, aesthetic; unchanged.
        settings: thresholds.

    Returns:
        a copy with kept, reject_reason, reject_value and reject_threshold.
    """
    verdicts = _Verdicts(table.index)
    verdicts.reject(table["integrity"] != "ok", "integrity", None, None)
    verdicts.reject(table["duplicate_of"].notna(), "duplicate", None, None)
    pixels = table["width"].astype(float) * table["height"].astype(float)
    # Negated comparisons, so that a missing signal (NaN) fails.
    verdicts.reject(
        ~(pixels >= settings.min_pixels), "resolution", pixels, float(settings.min_pixels)
    )
    flat = table["flat_fraction"].astype(float)
    verdicts.reject(
        ~(flat <= settings.max_flat_fraction), "flat_fraction", flat, settings.max_flat_fraction
    )
    entropy = table["entropy_bits"].astype(float)
    verdicts.reject(
        ~(entropy >= settings.min_entropy_bits), "entropy", entropy, settings.min_entropy_bits
    )
    if settings.min_quality is not None:
        quality = table["quality_score"].astype(float)
        verdicts.reject(~(quality > settings.min_quality), "quality", quality, settings.min_quality)
    if settings.aesthetic_top_fraction < 1.0:
        aesthetic = table["aesthetic"].astype(float)
        threshold = _aesthetic_threshold(
            aesthetic[verdicts.passing], settings.aesthetic_top_fraction
        )
        verdicts.reject(~(aesthetic >= threshold), "aesthetic", aesthetic, threshold)
    return table.assign(
        kept=verdicts.passing,
        reject_reason=verdicts.reason,
        reject_value=verdicts.value,
        reject_threshold=verdicts.threshold,
    )


def count_by_reason(table: pd.DataFrame) -> dict[str, int]:
    """Numbers of candidates, kept and rejected rows, each reason named even when it is zero."""
    counts = table["reject_reason"].value_counts()
    return {
        "candidates": len(table),
        "kept": int(table["kept"].sum()),
        **{f"rejected_{reason}": int(counts.get(reason, 0)) for reason in REASONS},
    }
