"""Every signal of every candidate in one table."""

from __future__ import annotations

import pandas as pd

from components.corpus.selection.bucket_columns import assign_buckets
from components.images.aspect_buckets import buckets
from components.settings.schema import Settings

# What each stage measures; a table made with a model or measurement switched off has fewer columns.
_SIGNALS = [
    "flat_fraction",
    "entropy_bits",
    "glcm_score",
    "glcm_entropy_bits",
    "jpeg_quality",
    "pdq_hash",
    "pdq_quality",
]
_QUALITY = [
    "quality_score",
    "quality_scorer",
    "quality_weights",
    "aesthetic",
    "aesthetic_scorer",
    "aesthetic_weights",
]
_PEOPLE = [
    "person_count",
    "person_boxes",
    "person_scorer",
    "person_weights",
    "is_character",
    "channel",
    "nsfw_score",
    "nsfw_scorer",
    "nsfw_weights",
]


def join_signals(
    manifest: pd.DataFrame,
    signals: pd.DataFrame,
    quality: pd.DataFrame,
    people: pd.DataFrame,
    settings: Settings,
) -> pd.DataFrame:
    """Everything that `rules.select` judges by, one row per candidate.

    Args:
        manifest: of the stage `ingest`.
        signals: of the stage of that name, as are `quality` and `people`; a row per distinct image.
        quality: scores.
        people: evidence of people, NSFW scores, channels.
        settings: `buckets` for the training sizes.
    """
    table = _with_signals(manifest, signals)
    table = _with_columns(table, quality, _QUALITY)
    table = _with_columns(table, people, _PEOPLE)
    # `qalign` is filled only by the model of that name: the paper's threshold means its scale.
    is_qalign = table["quality_scorer"].str.lower().str.startswith(("qalign", "q-align"))
    table["qalign"] = table["quality_score"].where(is_qalign.eq(True))
    return assign_buckets(table, buckets(settings.buckets))


def _with_columns(manifest: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Replace `columns` by those of `other`; duplicates of one image share its values."""
    # Dropped first, or merge would keep both under suffixed names.
    columns = [column for column in columns if column in other]
    return manifest.drop(columns=columns).merge(
        other[["image_id", *columns]], on="image_id", how="left", validate="many_to_one"
    )


def _with_signals(manifest: pd.DataFrame, signals: pd.DataFrame) -> pd.DataFrame:
    """Add signals; `integrity` becomes the first complaint of header, decoder or engine."""
    # What the engine says (a crash, a timeout) stands for a decoder that gave no answer.
    found = signals.assign(decoded=signals["error"].fillna(signals["integrity"]))
    # An empty column to be replaced: `_with_columns` drops what it brings.
    joined = _with_columns(manifest.assign(decoded=None), found, [*_SIGNALS, "decoded"])
    # A file with a bad header was never decoded: the header's complaint stands.
    header_is_fine = joined["integrity"] == "ok"
    joined["integrity"] = joined["integrity"].where(~header_is_fine, joined["decoded"])
    return joined.drop(columns="decoded")
