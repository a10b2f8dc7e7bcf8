"""Reading the small derivatives that the signals stage leaves for model scorers and reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq


@dataclass(frozen=True)
class Derivative:
    """A small JPEG of one image and the size of its original."""

    image_id: str
    height: int
    width: int
    jpeg: bytes


def read_derivatives(path: Path) -> Iterator[Derivative]:
    """Images that could be decoded, in file order; one row group is in memory at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                if row["jpeg"] is not None:
                    yield Derivative(**row)


def derivative_ids(path: Path) -> list[str]:
    """image_id of what `read_derivatives` yields, without reading any picture twice."""
    table = pq.read_table(path, columns=["image_id", "height"])
    return table.filter(table["height"].is_valid())["image_id"].to_pylist()
