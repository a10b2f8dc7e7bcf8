"""Scores made elsewhere: a table joined by image_id, checked before it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

_NAMED_IN_MESSAGES = 3


def read_external_scores(
    path: Path,
    image_ids: Sequence[str],
    columns: Sequence[str],
    *,
    setting: str,
    numeric: Sequence[str] = (),
    optional: Sequence[str] = (),
    complete: bool = True,
) -> pd.DataFrame:
    """Rows for `image_ids`, in that order, of a Parquet or CSV table.

    Args:
        path: ends in .parquet or .csv; may hold further images and columns, which are left out.
        image_ids: the images of the corpus.
        columns: required besides image_id.
        setting: settings key that names the file, for messages.
        numeric: those of `columns` that must be finite numbers.
        optional: read where the table has them, null where it does not.
        complete: every image must be in the table; otherwise those that are not have no row here.

    Raises:
        ValueError: missing file, columns or ids; an id twice; a value that is not a finite number.
    """
    if not path.is_file():
        raise ValueError(f"{setting}: {path.name}: no such file")
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{setting}: {path.name}: expected .parquet or .csv")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    missing_columns = [name for name in ("image_id", *columns) if name not in table.columns]
    if missing_columns:
        raise ValueError(
            f"{setting}: {path.name}: columns {missing_columns} are missing, "
            f"it has {list(table.columns)}"
        )
    twice = table["image_id"][table["image_id"].duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{setting}: {path.name}: {len(twice)} image_id occur more than once, "
            f"first {twice[0]!r}"
        )
    missing = sorted(set(image_ids) - set(table["image_id"]))
    if missing and complete:
        shown = ", ".join(missing[:_NAMED_IN_MESSAGES])
        raise ValueError(
            f"{setting}: {path.name}: {len(missing)} of {len(image_ids)} image_id have no row, "
            f"first {shown}"
        )
    by_id = table.reindex(columns=["image_id", *columns, *optional]).set_index("image_id")
    joined = by_id.loc[[name for name in image_ids if name in by_id.index]].reset_index()
    for name in optional:
        joined[name] = joined[name].astype(object).where(joined[name].notna(), None)
    for name in numeric:
        # `select` would reject the photograph of a NaN as if it were a bad one.
        values = pd.to_numeric(joined[name], errors="coerce").to_numpy(dtype=float)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{setting}: {path.name}: column {name}: {len(bad)} values are not finite "
                f"numbers, first for {joined['image_id'].iloc[bad[0]]}"
            )
    return joined
