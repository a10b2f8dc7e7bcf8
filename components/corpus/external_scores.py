"""Scores made elsewhere: a table joined by image_id, checked before it is believed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_NAMED_IN_MESSAGES = 3


def is_name(value: Any) -> bool:
    """Whether it is text that a person can read, of one line."""
    return isinstance(value, str) and value.isprintable() and not value.isspace() and value != ""


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def read_external_scores(
    path: Path,
    image_ids: Sequence[str],
    columns: Sequence[str],
    *,
    setting: str,
    numeric: Sequence[str] = (),
    named: Sequence[str] = (),
    optional: Sequence[str] = (),
    complete: bool = True,
) -> pd.DataFrame:
    """Rows for `image_ids`, in that order, of a Parquet or CSV table.

    Args:
        path: ends in .parquet or .csv; may hold further images and columns, which are left out.
        image_ids: the images of the corpus.
        columns: required besides image_id; text or null unless one of the following.
        setting: settings key that names the file, for messages.
        numeric: those of `columns` that must be finite numbers.
        named: those of `columns` that must be a name, such as a scorer's.
        optional: read where the table has them, null where it does not; text.
        complete: every image must be in the table; otherwise those that are not have no row here.

    Raises:
        ValueError: missing file, columns or ids; no such table; an id twice; a value that is none
            of its column.
    """
    if not path.is_file():
        raise ValueError(f"{setting}: {path.name}: no such file")
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{setting}: {path.name}: expected .parquet or .csv")
    table = _read(path, {"image_id", *columns, *optional} - set(numeric), setting)
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
    for name in (*columns, *optional):
        if name in numeric:
            # `select` would reject the photograph of a NaN as if it were a bad one.
            values = pd.to_numeric(joined[name], errors="coerce").astype("float64")
            fits, what = values.map(math.isfinite), "finite numbers"
        else:
            values = joined[name].astype(object).where(joined[name].notna(), None)
            fits, what = values.map(_is_text), "text"
            if name in named:
                fits, what = values.map(is_name), "names of one line"
        bad = np.flatnonzero(~fits.to_numpy(dtype=bool))
        if len(bad):
            raise ValueError(
                f"{setting}: {path.name}: column {name}: {len(bad)} values are not {what}, "
                f"first for {joined['image_id'].iloc[bad[0]]}"
            )
        joined[name] = values
    return joined


def _read(path: Path, text: set[str], setting: str) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        # A scorer that is called 7, or a digest of digits alone, is no number.
        kinds = dict.fromkeys(text, str)
        with warnings.catch_warnings():
            # A row of more cells than headings: pandas would drop some, or take ids of another.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(path, dtype=kinds, index_col=False)
    except (OSError, ValueError, pd.errors.ParserWarning) as problem:
        said = " ".join(str(problem).split())
        raise ValueError(f"{setting}: {path.name}: no table of this kind: {said}") from None
