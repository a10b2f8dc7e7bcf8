"""`ultraflux measure`: signals of images outside any pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.commands.tables import table_of, terminal

COLUMNS = {
    "width": "{}",
    "height": "{}",
    "entropy_bits": "{:.4f}",
    "flat_fraction": "{:.4f}",
    "glcm_score": "{:.4f}",
    "glcm_entropy_bits": "{:.4f}",
    "jpeg95_ratio": "{:.3f}",
}


def image_paths(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as given; folders give the images in them, recursively, sorted."""
    from components.corpus.folder_survey import READ
    from components.corpus.listing.source_files import photographs

    for path in paths:
        if path.is_dir():
            yield from sorted(photographs(path, READ))
        else:
            yield path


def measure_paths(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """One row per image; an unreadable one has null values and `error`."""
    from components.signals.candidate import measure_image
    from components.telemetry.progress import track

    found = list(image_paths(paths))
    if not found:
        yield {"path": ", ".join(str(path) for path in paths), "error": "no images there"}
        return
    for path in track(found, "measure"):
        yield measure_image(path)


def measurement_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table for people."""
    lines = []
    for row in rows:
        cells = [
            "-" if row.get(name) is None else layout.format(row[name])
            for name, layout in COLUMNS.items()
        ]
        name = Path(row["path"]).name
        lines.append((f"{name}  {row['error']}" if "error" in row else name, *cells))
    terminal(file_width=200).print(table_of(("image", *COLUMNS), lines))
