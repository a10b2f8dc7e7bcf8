"""Training slices: who is held out, and what each training regime of the paper sees."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from components.corpus.selection.draws import uniform_draws
from components.corpus.selection.quotas import smallest_draws, stratified_sizes
from components.corpus.selection.rules import strata
from components.settings.corpus import SlicesSettings

SLICES = ("vae", "stage1", "stage2", "ablation", "eval")

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
    draws = uniform_draws(seed, table["image_id"].iloc[rows].tolist())
    # The floor wins in a small corpus: a validation loss of two images says nothing.
    held_out = max(round(settings.eval_fraction * len(rows)), settings.eval_min_images)
    result = np.full(len(table), None, dtype=object)
    result[rows] = "train"
    result[rows[np.argsort(draws, kind="stable")[:held_out]]] = "eval"
    return pd.Series(result, index=table.index, dtype=object)


def _top(rows: pd.DataFrame, column: str, ascending: bool, fraction: float, floor: int) -> pd.Index:
    """Index of the best `fraction` by `column`, at least `floor` rows; ties go by image_id.

    Missing values come last. Only the rows at the border are compared by image_id, because sorting
    a million hashes takes longer than all the rest.
    """
    # Rounded up: a share of a small corpus is at least one image.
    count = max(math.ceil(fraction * len(rows)), floor)
    if count >= len(rows):
        return rows.index
    values = rows[column].to_numpy(dtype=float, na_value=math.nan)
    # Smallest first in both directions, unknown at the end.
    keys = np.where(np.isnan(values), math.inf, values if ascending else -values)
    border = np.partition(keys, count - 1)[count - 1]
    # All below the border are in; only ties compete, and image_id decides among them.
    inside = np.flatnonzero(keys < border)
    tied = rows["image_id"].iloc[np.flatnonzero(keys == border)].sort_values()
    return rows.index[inside].append(tied.index[: count - len(inside)])


def _stratified(rows: pd.DataFrame, size: int, seed: int) -> pd.Index:
    """Index of a random subset in the proportions of the strata."""
    groups = strata(rows)
    # Not the draws of `split`: among training images those begin at its border.
    draws = uniform_draws(seed, rows["image_id"].tolist(), "ablation")
    sizes = stratified_sizes(np.bincount(groups).tolist(), size)
    taken, _ = smallest_draws(groups, draws, sizes)
    return rows.index[taken]


def slices(table: pd.DataFrame, settings: SlicesSettings, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Cut the training and evaluation tables; rows stay in manifest order.

    vae: the share of the training images with the least flat area (paper: half). stage1: all
    training images. stage2: the top share by aesthetic score (SACL; paper: 5%). ablation: a random
    subset of stage1, stratified by bucket, channel and character (paper: 500K). eval: held out. A
    floor above the number of images takes all there are.

    Args:
        table: manifest with image_id, split, flat_fraction and aesthetic; for strata bucket,
            channel and is_character.
        settings: shares and floors.
        seed: project seed.
    """
    train = table[table["split"] == "train"]
    floor = settings.min_images
    detailed = _top(train, "flat_fraction", True, settings.vae_top_fraction, floor)
    beautiful = _top(train, "aesthetic", False, settings.stage2_top_fraction, floor)
    subset = _stratified(train, settings.ablation_images, seed)
    return {
        # By membership, so that rows stay in manifest order.
        "vae": train[train.index.isin(detailed)],
        "stage1": train,
        "stage2": train[train.index.isin(beautiful)],
        "ablation": train[train.index.isin(subset)],
        "eval": table[table["split"] == "eval"],
    }
