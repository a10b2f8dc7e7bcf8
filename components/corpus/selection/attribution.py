"""Attribution: whose photographs a slice holds, under which licence, in files that travel with it.

Creative Commons asks for the author, the licence and its address, the source, and a word about
changes: photographs are resized and cropped for training, which every file says.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from components.corpus.manifest_columns import frame_of, manifest_batches
from components.corpus.selection.rights import is_share_alike, license_id, license_url
from components.files.whole_files import whole_file

COLUMNS = (
    *("image_id", "uri", "license", "photographer", "photographer_url"),
    *("work_url", "image_url", "source"),
)
FIELDS = (*COLUMNS, "license_id", "license_url", "share_alike", "changes")
CHANGES = "resized and cropped to a training size"


@lru_cache(4096)
def _licence(text: str) -> tuple[str, ...]:
    """What `FIELDS` have behind `COLUMNS`."""
    name = license_id(text)
    return name, license_url(name), "yes" if is_share_alike(name) else "no", CHANGES


def _credits(rows: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """`FIELDS` of some rows of a manifest, as texts; what is unknown is empty."""
    place = COLUMNS.index("license")
    for row in rows.fillna("").itertuples(index=False, name=None):
        yield (*row, *_licence(row[place]))


def write_attribution(manifest: Path, slices: Mapping[str, np.ndarray], folder: Path) -> None:
    """A CSV per slice, rows in manifest order; a few thousand rows are in memory.

    Args:
        manifest: manifest on disk.
        slices: ascending row numbers by name (`slices.slice_rows`).
        folder: of the files; made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    used = np.unique(np.concatenate(list(slices.values())))
    with ExitStack() as stack:
        writers = []
        for name, rows in slices.items():
            path = stack.enter_context(whole_file(folder / f"{name}.csv"))
            file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
            writers.append((csv.writer(file, lineterminator="\n"), rows))
        for writer, _ in writers:
            writer.writerow(FIELDS)
        start = 0
        for batch in manifest_batches(manifest, COLUMNS, code_text=False):
            stop = start + len(batch)
            inside = _between(used, start, stop)
            found = _credits(frame_of(batch.take(pa.array(inside - start)), COLUMNS))
            texts = dict(zip(inside.tolist(), found, strict=True))
            for writer, rows in writers:
                writer.writerows(texts[row] for row in _between(rows, start, stop).tolist())
            start = stop


def _between(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    first, last = np.searchsorted(rows, (start, stop))
    return rows[first:last]


def read_attribution_file(path: Path) -> list[dict[str, str]]:
    """Rows of a file of `write_attribution`."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def counted_licenses(rows: list[dict[str, str]]) -> list[tuple[str, str, int]]:
    """(licence, address of its text, photographs) by falling count, then by name."""
    counts = Counter((row["license_id"], row["license_url"]) for row in rows)
    return sorted(((*key, n) for key, n in counts.items()), key=lambda one: (-one[2], one[0]))
