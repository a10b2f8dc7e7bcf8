"""Attribution: whose photographs a slice holds, under which licence, in files that travel with it.

Creative Commons asks for the author, the licence and its address, the source, and a word about
changes: photographs are resized and cropped for training, which every file says.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from components.corpus.selection.rights import is_share_alike, license_id, license_url
from components.files.whole_files import write_text

COLUMNS = (
    *("image_id", "uri", "license", "photographer", "photographer_url"),
    *("work_url", "image_url", "source"),
)
FIELDS = (*COLUMNS, "license_id", "license_url", "share_alike", "changes")
_ROWS = 10_000
CHANGES = "resized and cropped to a training size"


def attribution_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """`FIELDS` of every row of a manifest, as texts; what is unknown is empty."""
    given = table.reindex(columns=list(COLUMNS)).astype(object)
    rows = given.where(given.notna(), "").to_dict("records")
    found = []
    for row in rows:
        name = license_id(row["license"])
        found.append(
            {str(key): str(value) for key, value in row.items()}
            | {
                "license_id": name,
                "license_url": license_url(name),
                "share_alike": "yes" if is_share_alike(name) else "no",
                "changes": CHANGES,
            }
        )
    return found


def write_attribution(
    manifest: pd.DataFrame, slices: Mapping[str, np.ndarray], folder: Path
) -> None:
    """A CSV per slice, rows in manifest order.

    Args:
        manifest: with `COLUMNS`, as far as it has them.
        slices: row numbers by name (`slices.slice_rows`).
        folder: of the files; made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in slices.items():
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        # Rows as texts take ten times what the table takes.
        for start in range(0, len(rows), _ROWS):
            writer.writerows(attribution_rows(manifest.iloc[rows[start : start + _ROWS]]))
        write_text(folder / f"{name}.csv", out.getvalue())


def read_attribution_file(path: Path) -> list[dict[str, str]]:
    """Rows of a file of `write_attribution`."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def counted_licenses(rows: list[dict[str, str]]) -> list[tuple[str, str, int]]:
    """(licence, address of its text, photographs) by falling count, then by name."""
    counts = Counter((row["license_id"], row["license_url"]) for row in rows)
    return sorted(((*key, n) for key, n in counts.items()), key=lambda one: (-one[2], one[0]))
