"""What the report pages share: tables, cells, templates.

`report` is the page about a run of the pipeline, `suite_report` the one about an evaluation of
systems on a suite; both are one file each, made of the same parts (templates/parts.html.j2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from components.evaluation.pages.report_sources import number
from components.files.page_templates import page_templates
from components.metrics.cards import card
from components.metrics.published import PublishedTable

RULE_NAMES = {
    "vae_psnr_gain_db": "Autoencoder PSNR gain on held-out images (dB)",
    "validation_loss_drop": "Transformer validation loss drop over both stages (fraction)",
    "training_images_loss_drop": "Transformer loss drop on training images, stage 1 (fraction)",
    "twin_psnr_db_worst": "Worst twin beside its photograph at 1/8 size (dB)",
    "twins_recognised": "Twins whose nearest photograph is their own",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: value and, where n >= 2, its interval."""

    text: str
    interval: str = ""
    best: bool = False
    """Of the measured systems in its column."""


@dataclass(frozen=True)
class Row:
    """A row of a metrics table."""

    name: str
    cells: tuple[Cell, ...]
    published: bool = False
    first_ours: bool = False


@dataclass(frozen=True)
class Table:
    """A metrics table: published rows above ours."""

    caption: str
    source: str
    """Where the published rows are from; empty without such rows."""
    first: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    strata: tuple[Row, ...] = ()
    """Rows of single strata, in a part of their own."""
    strata_count: int = 0


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class ImageRow:
    """One image in a sortable table."""

    image: str
    system: str
    height: int
    width: int
    cells: tuple[tuple[float | None, str], ...]
    """(value to sort by, text)."""
    thumbnail: str = ""
    """Id of a picture embedded in the page."""
    item: str = ""
    """Id of a viewer's item that the row opens."""
    detail: str = ""
    """Further text that the filter looks at, such as the prompt."""


@dataclass(frozen=True)
class ImageTable:
    """A sortable, filterable table; `rows` may be fewer than `total`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[ImageRow, ...]
    total: int

    @property
    def systems(self) -> tuple[str, ...]:
        """Distinct systems in order of appearance."""
        return tuple(dict.fromkeys(row.system for row in self.rows))


def column_name(metric: str) -> str:
    """Name and arrow of a metric, as the papers print them."""
    found = card(metric)
    return f"{found.name} {found.arrow}".strip()


def fixed(value: float | None, metric: str) -> str:
    """`value` with the digits of the metric's card; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{card(metric).decimals}f}"


def published_rows(table: PublishedTable, extra_columns: int = 0) -> list[Row]:
    """Rows as the paper prints them, with `extra_columns` empty cells at their ends."""
    blank = (Cell(""),) * extra_columns
    return [
        Row(
            row.title,
            tuple(Cell(value) for value in row.values) + blank,
            published=True,
        )
        for row in table.rows
    ]


def environment() -> jinja2.Environment:
    """Templates of this package, and the filter `number`."""
    found = page_templates(Path(__file__).parent / "templates")
    found.filters["number"] = number
    return found


def assets(names: Iterable[str]) -> Markup:
    """Our own style sheets or scripts, one after the other; trusted text."""
    folder = files("components.evaluation.pages").joinpath("templates")
    return Markup("\n".join(folder.joinpath(name).read_text("utf-8") for name in names))


STYLES = ("report.css", "viewer.css")
SCRIPTS = ("report.js", "viewer.js")
