"""Training slices: who is held out, and what each training regime of the paper sees."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from components.corpus.selection.draws import uniform_draws
from components.corpus.selection.quotas import smallest_draws, stratified_sizes
from components.corpus.selection.rules import STRATA, strata
from components.settings.corpus import SlicesSettings

SLICES = ("vae", "stage1", "stage2", "ablation", "eval")

COLUMNS = (
    *("image_id", "kept", "split", "flat_fraction", "aesthetic"),
    *STRATA,
)
"""What `split` and `slice_rows` read of a manifest."""

DESCRIPTIONS = {
    "vae": "VAE post-training: the training images with the least flat area",
    "stage1": "DiT stage 1: all training images",
    "stage2": "DiT stage 2 (SACL): the training images with the highest aesthetic score",
    "ablation": "ablations: a random subset of stage 1, stratified by bucket, channel and people",
    "eval": "held out from all training",
}


def split(table: pd.DataFrame, settings: SlicesSettings, seed: int) -> pd.Series:
    """Hold images out for evaluation.

    Images are ordered by a hash of (seed, image_id) and the first eval_fraction of them, at least
    eval_min_images, are held out: adding a few photographs moves only those at the border.

    Args:
        table: manifest with image_id and kept.
        settings: shares and floors.
        seed: project seed.

    Returns:
        "train", "eval", or None for rows that are not kept.
    """
    rows = np.flatnonzero(table["kept"].eq(True).to_numpy(dtype=bool))
    # By image, not by position: a corpus that grows keeps its held-out images held out.
    draws = uniform_draws(seed, table["image_id"].iloc[rows])
    # The floor wins in a small corpus: a validation loss of two images says nothing.
    held_out = max(round(settings.eval_fraction * len(rows)), settings.eval_min_images)
    result = np.full(len(table), None, dtype=object)
    result[rows] = "train"
    result[rows[np.argsort(draws, kind="stable")[:held_out]]] = "eval"
    return pd.Series(result, index=table.index, dtype=object)


def _top(
    table: pd.DataFrame, rows: np.ndarray, column: str, ascending: bool, count: int
) -> np.ndarray:
    """The best `count` of `rows` by `column`, in their order; ties go by image_id.

    Missing values come last. Only the rows at the border are compared by image_id, because sorting
    a million hashes takes longer than all the rest.
    """
    if count >= len(rows):
        return rows
    values = table[column].to_numpy(dtype=float, na_value=math.nan)[rows]
    # Smallest first in both directions, unknown at the end.
    keys = np.where(np.isnan(values), math.inf, values if ascending else -values)
    border = np.partition(keys, count - 1)[count - 1]
    # All below the border are in; only ties compete, and image_id decides among them.
    inside = keys < border
    tied = np.flatnonzero(keys == border)
    by_id = table["image_id"].iloc[rows[tied]].reset_index(drop=True).sort_values()
    inside[tied[by_id.index[: count - int(inside.sum())]]] = True
    return rows[inside]


def _stratified(table: pd.DataFrame, rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A random subset of `rows` in the proportions of the strata."""
    groups = strata(table[[name for name in STRATA if name in table]].iloc[rows])
    # Not the draws of `split`: among training images those begin at its border.
    draws = uniform_draws(seed, table["image_id"].iloc[rows], "ablation")
    sizes = stratified_sizes(np.bincount(groups).tolist(), size)
    taken, _ = smallest_draws(groups, draws, sizes)
    return rows[taken]


def slice_rows(
    table: pd.DataFrame, settings: SlicesSettings, seed: int = 0
) -> dict[str, np.ndarray]:
    """Cut the training and evaluation tables: row numbers of each slice, ascending.

    vae: the share of the training images with the least flat area (paper: half). stage1: all
    training images. stage2: the top share by aesthetic score (SACL; paper: 5%). ablation: a random
    subset of stage1, stratified by bucket, channel and character (paper: 500K). eval: held out. A
    floor above the number of images takes all there are.

    Args:
        table: manifest with `COLUMNS`.
        settings: shares and floors.
        seed: project seed.
    """
    train = np.flatnonzero(table["split"].eq("train").to_numpy(dtype=bool, na_value=False))

    def size(fraction: float) -> int:
        # Rounded up: a share of a small corpus is at least one image.
        return max(math.ceil(fraction * len(train)), settings.min_images)

    return {
        "vae": _top(table, train, "flat_fraction", True, size(settings.vae_top_fraction)),
        "stage1": train,
        "stage2": _top(table, train, "aesthetic", False, size(settings.stage2_top_fraction)),
        "ablation": _stratified(table, train, settings.ablation_images, seed),
        "eval": np.flatnonzero(table["split"].eq("eval").to_numpy(dtype=bool, na_value=False)),
    }


def slices(table: pd.DataFrame, settings: SlicesSettings, seed: int = 0) -> dict[str, pd.DataFrame]:
    """The slices of `slice_rows` as tables, rows in manifest order."""
    return {name: table.iloc[rows] for name, rows in slice_rows(table, settings, seed).items()}
