"""Stores, batch plan, model and engine of a DiT training job, put together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd


def training_ids(
    index: pd.DataFrame, train_slice: Path | None, rejected: Collection[str] = ()
) -> dict[str, str]:
    """Bucket by image id of the training images; `rejected` ones have no latent and are left out.

    Raises:
        ValueError: nothing to train on, or the slice names images without latents.
    """
    rows = index[index["split"] == "train"]
    if train_slice is not None:
        wanted = set(pd.read_parquet(train_slice, columns=["image_id"])["image_id"])
        wanted -= set(rejected)
        absent = sorted(wanted - set(rows["image_id"]))
        if absent:
            raise ValueError(
                f"{train_slice.name}: {len(absent)} of {len(wanted)} images have no training "
                f"latents (first: {absent[0]}); run the stage `latents` again"
            )
        rows = rows[rows["image_id"].isin(wanted)]
    if rows.empty:
        raise ValueError("there is no training image; relax the rules in `select` or add photos")
    return dict(zip(rows["image_id"], rows["bucket"], strict=True))
