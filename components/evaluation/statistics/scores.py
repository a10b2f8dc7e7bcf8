"""The long table of measurements, one row per image and metric, and its summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from components.evaluation.statistics.bootstrap import (
    Estimate,
    mean_interval,
    ratio_sums,
    sums_interval,
)
from components.metrics.cards import card
from components.metrics.native.texture import set_compression_ratio

RECONSTRUCTION_BEFORE = "reconstruction_before"
RECONSTRUCTION_AFTER = "reconstruction_after"
GENERATED = "generated"
PHOTOGRAPHS = "photographs"
COLUMNS = ("image", "system", "height", "width", "metric", "protocol", "value", "prompt")


@dataclass(frozen=True)
class Score:
    """One measurement."""

    image: str
    """image_id of a photograph, file name of a generated image."""
    system: str
    height: int
    """Pixels of the image as measured."""
    width: int
    metric: str
    protocol: str
    value: float | None
    """None where the image is too small for the metric."""
    prompt: str | None = None
    """What the image was made from; comparisons take images of one prompt as dependent."""


def image_scores(
    image: str,
    system: str,
    size: tuple[int, int],
    values: Mapping[str, float | None],
    prompt: str | None = None,
) -> list[Score]:
    """Rows of one image: every metric of `values`, protocol ids from the cards."""
    height, width = size
    return [
        Score(image, system, height, width, metric, card(metric).protocol, value, prompt)
        for metric, value in values.items()
    ]


def text_column(values: pd.Series[Any]) -> pd.Series[Any]:
    """Texts with None where there is none, one type however many are missing."""
    # A column of None alone would be written as Parquet's null type, which cannot be joined with a
    # table that has texts.
    return values.astype("str").where(values.notna(), None)


def scores_table(scores: Iterable[Score]) -> pd.DataFrame:
    """All rows in a fixed order: system, image, size, metric; a missing value is NaN."""
    # Columns are named, so that an empty table has them too.
    table = pd.DataFrame([asdict(score) for score in scores], columns=list(COLUMNS))
    table["value"] = table["value"].astype("float64")
    table["prompt"] = text_column(table["prompt"])
    # The order is part of the stage's output: DVC compares its bytes.
    return table.sort_values(
        ["system", "image", "height", "width", "metric"], kind="stable", ignore_index=True
    )


def values_of(table: pd.DataFrame, system: str, metric: str) -> pd.DataFrame:
    """Finite rows of one system and metric."""
    rows = table[(table["system"] == system) & (table["metric"] == metric)]
    # NaN is a picture too small for the metric, infinity a PSNR of equal pictures; neither has a
    # place in a mean. Callers count what is left.
    finite: pd.DataFrame = rows.loc[np.isfinite(rows["value"].to_numpy(dtype=np.float64))]
    return finite


def prompt_clusters(rows: pd.DataFrame, picture: str = "image") -> list[str]:
    """What is independent among rows: their prompt, or the picture itself where it has none."""
    prompts = rows["prompt"] if "prompt" in rows else pd.Series([None] * len(rows))
    # Marked, so that a prompt that reads like a picture's name is no cluster with it.
    return [
        f"prompt {prompt}" if isinstance(prompt, str) else f"picture {name}"
        for prompt, name in zip(prompts, rows[picture], strict=True)
    ]


def set_estimate(
    rows: pd.DataFrame, metric: str, *, resamples: int, seed: int, picture: str = "image"
) -> Estimate | None:
    """`set_value` of finite rows of one metric, with its interval.

    Args:
        rows: with the columns `COLUMNS`; all of one system and metric.
        metric: id of a card.
        resamples: of the bootstrap.
        seed: of it.
        picture: column that names a picture.

    Returns:
        None with fewer than two independent prompts or pictures.
    """
    clusters = prompt_clusters(rows, picture)
    if len(set(clusters)) < 2:
        return None
    values = rows["value"].to_numpy(dtype=np.float64)
    if metric != "compression_ratio":
        return mean_interval(values, clusters=clusters, resamples=resamples, seed=seed)
    pixels = (rows["height"] * rows["width"]).to_numpy(dtype=np.float64)
    # Raw over compressed bytes, as `set_value` has it; three bytes a pixel cancel.
    grouped = ratio_sums(pixels, pixels / values, clusters)
    return sums_interval(grouped, len(rows), resamples=resamples, seed=seed)


def mean_estimate(
    table: pd.DataFrame, system: str, metric: str, *, resamples: int, seed: int
) -> Estimate | None:
    """Number of a set and its interval over prompts; None with fewer than two of them."""
    rows = values_of(table, system, metric)
    return set_estimate(rows, metric, resamples=resamples, seed=seed)


def _pairs(table: pd.DataFrame, metric: str) -> tuple[list[float], list[float]]:
    """(before, after) of the images that both reconstructions have, in order of image."""
    before = values_of(table, RECONSTRUCTION_BEFORE, metric).set_index("image")["value"]
    after = values_of(table, RECONSTRUCTION_AFTER, metric).set_index("image")["value"]
    # A picture without a finite value on one side leaves both, so that a gain is of the same
    # pictures.
    shared = sorted(set(before.index) & set(after.index))
    return before.loc[shared].to_list(), after.loc[shared].to_list()


def reconstruction_gain(
    table: pd.DataFrame, metric: str, *, resamples: int, seed: int
) -> Estimate | float | None:
    """Paired after-minus-before: an interval from two images on, a bare number for one.

    Both are reconstructions of one photograph, which has no prompt: photographs are the units.
    """
    before, after = _pairs(table, metric)
    if not before:
        return None
    # A number without an interval, never one with an interval of width zero.
    if len(before) == 1:
        return after[0] - before[0]
    differences = np.asarray(after) - np.asarray(before)
    return mean_interval(differences, resamples=resamples, seed=seed)


def set_value(rows: pd.DataFrame, metric: str) -> float | None:
    """One number for a set of images: the mean, or for the compression ratio sum over sum."""
    measured = rows[(rows["metric"] == metric) & rows["value"].notna()]
    if measured.empty:
        return None
    # A mean of ratios would weigh a small picture like a large one; the papers divide the sums.
    if metric == "compression_ratio":
        pixels = measured["height"] * measured["width"]
        return set_compression_ratio(zip(measured["value"], pixels, strict=True))
    return float(measured["value"].mean())


def headline_metrics(table: pd.DataFrame, *, resamples: int, seed: int) -> dict[str, float]:
    """Flat numbers of `metrics.json`: means by system, gains, 95% limits where n >= 2."""
    out: dict[str, float] = {}
    for system in sorted(set(table["system"])):
        rows = table[table["system"] == system]
        for metric in sorted(set(rows["metric"])):
            # Left out where not finite: JSON has no NaN, and an absent number fails the gate.
            value = set_value(rows, metric)
            if value is not None and math.isfinite(value):
                out[f"{system}_{metric}"] = value
        # A picture has a row for each metric, and one name may occur at several sizes.
        out[f"{system}_images"] = float(
            rows[["image", "height", "width"]].drop_duplicates().shape[0]
        )
    # The gate reads `vae_psnr_gain_db`; a unit stands last in a name, also in this one.
    for metric in ("psnr_db", "ssim", "nmse"):
        name = "vae_psnr_gain_db" if metric == "psnr_db" else f"vae_{metric}_gain"
        gain = reconstruction_gain(table, metric, resamples=resamples, seed=seed)
        if isinstance(gain, float):
            out[name] = gain
        elif gain is not None:
            out |= {name: gain.mean, f"{name}_low": gain.low, f"{name}_high": gain.high}
    # Sorted, since metrics.json is compared byte by byte.
    return dict(sorted(out.items()))
