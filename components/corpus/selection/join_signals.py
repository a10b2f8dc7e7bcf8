"""Every signal of every candidate in one table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pandas.api.extensions import take

from components.corpus.manifest import SCHEMA
from components.corpus.manifest_columns import is_coded, read_columns
from components.corpus.selection.bucket_columns import assign_buckets
from components.corpus.selection.rights import EXCLUDED, Exclusions
from components.corpus.selection.rules import COLUMNS
from components.images.aspect_buckets import buckets
from components.settings.schema import Settings

# What each stage measures; a table made with a model or measurement switched off has fewer columns.
_SIGNALS = [
    "alpha_fraction",
    "decode_note",
    "flat_fraction",
    "entropy_bits",
    "glcm_score",
    "glcm_entropy_bits",
    "jpeg_quality",
    "pdq_hash",
    "pdq_quality",
]
_COMPLAINTS = ["integrity", "error"]
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
    "drawing_score",
]


MANIFEST_COLUMNS = tuple(name for name in COLUMNS if name in SCHEMA.names)
"""What is read of the manifest; all other columns stay as they are."""


def read_candidates(
    manifest: Path,
    signals: Path,
    quality: Path,
    people: Path,
    settings: Settings,
    exclusions: Exclusions,
) -> pd.DataFrame:
    """`join_signals` of tables on disk, without the columns of which nothing is asked.

    Args:
        manifest: of the stage `ingest`.
        signals: of the stage of that name, as are `quality` and `people`.
        quality: scores.
        people: evidence of people, NSFW scores, channels.
        settings: see `join_signals`.
        exclusions: who is on the list.

    Returns:
        `MANIFEST_COLUMNS`, all that was measured, and `EXCLUDED` where the list names somebody.
    """
    table = join_signals(
        read_columns(manifest, MANIFEST_COLUMNS),
        _read(signals, [*_SIGNALS, *_COMPLAINTS]),
        _read(quality, [*_QUALITY, "error"]),
        _read(people, _PEOPLE),
        settings,
    )
    excluded = exclusions.column(manifest)
    return table if excluded is None else table.assign(**{EXCLUDED: excluded})


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Columns of a table beside a manifest, as far as it has them."""
    coded = [name for name in columns if name not in _COMPLAINTS and is_coded(name)]
    with pq.ParquetFile(path, read_dictionary=coded) as file:
        known = [name for name in ("image_id", *columns) if name in file.schema_arrow.names]
        return file.read(columns=known).to_pandas(split_blocks=True, self_destruct=True)


def join_signals(
    manifest: pd.DataFrame,
    signals: pd.DataFrame,
    quality: pd.DataFrame,
    people: pd.DataFrame,
    settings: Settings,
) -> pd.DataFrame:
    """Everything that `rules.select` judges by, one row per candidate.

    Args:
        manifest: of the stage `ingest`; at least `MANIFEST_COLUMNS`.
        signals: of the stage of that name, as are `quality` and `people`; a row per distinct image.
        quality: scores.
        people: evidence of people, NSFW scores, channels.
        settings: `buckets` for the training sizes.

    Raises:
        ValueError: an image stands twice in one of the three.
    """
    table = _with_signals(manifest, signals)
    table = _with_scores(table, quality)
    table = _with_columns(table, people, _PEOPLE)
    # `qalign` is filled only by the model of that name: the paper's threshold means its scale.
    is_qalign = table["quality_scorer"].str.lower().str.startswith(("qalign", "q-align"))
    table["qalign"] = table["quality_score"].where(is_qalign.eq(True))
    return assign_buckets(table, buckets(settings.buckets))


def _with_columns(manifest: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Replace `columns` by those of `other`; duplicates of one image share its values."""
    rows = _positions(manifest["image_id"], other["image_id"])
    found = {name: other[name].array for name in columns if name in other}
    if len(rows) != len(other) or (rows != np.arange(len(rows))).any():
        # Not a merge, which copies the whole table for every one that is joined to it.
        is_known = bool((rows >= 0).all())
        # The function passes an axis to Arrow's arrays, which know none; the method fills nothing.
        found = {
            name: array.take(rows) if is_known else take(array, rows, allow_fill=True)
            for name, array in found.items()
        }
    return manifest.assign(**found)


def _positions(image_ids: pd.Series, among: pd.Series) -> np.ndarray:
    """(rows of `image_ids`,) int64: where each stands in `among`, -1 where nowhere."""
    if not among.is_unique:
        twice = among[among.duplicated()].iloc[0]
        raise ValueError(f"image {twice} was measured twice")
    asked, known = (pa.chunked_array(pa.array(c, pa.large_string())) for c in (image_ids, among))
    if asked.equals(known):
        return np.arange(len(asked))
    found = pc.fill_null(pc.index_in(asked, value_set=known), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def _with_signals(manifest: pd.DataFrame, signals: pd.DataFrame) -> pd.DataFrame:
    """Add signals; `integrity` becomes the first complaint of header, decoder or engine."""
    # What the engine says (a crash, a timeout) stands for a decoder that gave no answer.
    found = signals.assign(decoded=signals["error"].fillna(signals["integrity"]))
    joined = _with_columns(manifest, found, [*_SIGNALS, "decoded"])
    # A file with a bad header was never decoded: the header's complaint stands.
    header = joined["integrity"].astype("str")
    joined["integrity"] = header.where(header != "ok", joined["decoded"])
    return joined.drop(columns="decoded")


def _with_scores(table: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Add scores; `integrity` becomes the complaint of a scorer that gave none.

    Every kept row has both scores. One that cannot have them (1x1 pixels) is rejected like one that
    could not be measured, or the contract would end the stage for all.
    """
    if "error" not in quality or quality["error"].isna().all():
        return _with_columns(table, quality, _QUALITY)
    is_scored = quality[["quality_score", "aesthetic"]].notna().all(axis=1)
    found = quality.assign(unscored=quality["error"].mask(is_scored))
    joined = _with_columns(table, found, [*_QUALITY, "unscored"])
    refused = joined["integrity"].eq("ok") & joined["unscored"].notna()
    joined["integrity"] = joined["integrity"].mask(refused, joined["unscored"])
    return joined.drop(columns="unscored")
