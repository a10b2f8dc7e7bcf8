"""A filled table for programs and papers: JSON, CSV, and the page's tables for LaTeX."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from components.evaluation.pages.report_page import Cell, Row, Table
from components.evaluation.paper_tables.filled import FilledCell, FilledRow, FilledTable

_HERE = "here"
_OTHER = "†"
"""Marks a number of ours that does not compare with the printed ones."""
_COLUMNS = (
    *("table", "group", "system", "from", "column", "measure", "text"),
    *("value", "low", "high", "n", "infinite", "comparable", "why_not", "needs"),
)


def as_json(filled: FilledTable) -> dict[str, Any]:
    """Everything that is known of a table, JSON-ready."""
    table = filled.table
    return {
        "table": table.name,
        "caption": table.caption,
        "source": table.source,
        "suite": table.suite,
        "made_with": table.wants,
        "columns": [
            {"head": f.head, "measure": f.measure, "protocol": f.protocol, "script": f.script}
            for f in table.fields
        ],
        "rows": [
            {
                "system": row.label,
                "group": row.stratum,
                "published": row.is_published,
                "folder": row.folder,
                "cells": [_cell(cell) for cell in row.cells],
            }
            for row in filled.rows
        ],
        "needs": [{"what": need.what, "command": need.command} for need in filled.needs],
        "notes": list(filled.notes),
    }


def _cell(cell: FilledCell) -> dict[str, Any]:
    found: dict[str, Any] = {"text": cell.text}
    if cell.number is not None:
        value = cell.number.value
        found |= {
            # JSON has no infinity.
            "value": value if math.isfinite(value) else None,
            "low": cell.number.low,
            "high": cell.number.high,
            "n": cell.number.n,
            "infinite": cell.number.infinite,
            "comparable": not cell.incomparable,
            "why_not": cell.incomparable,
        }
    if cell.needs:
        found["needs"] = list(cell.needs)
    return found


def as_csv(filled: FilledTable) -> str:
    """A row per cell: what is printed, or what was measured here, or what it needs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in filled.rows:
        for field, cell in zip(filled.table.fields, row.cells, strict=True):
            number = cell.number
            values: tuple[float | None, ...] = (None,) * 5
            if number is not None:
                values = number.value, number.low, number.high, number.n, number.infinite
            shown = ["" if value is None else repr(value) for value in values]
            lacking = "; ".join(
                f"{filled.needs[place - 1].what}: {filled.needs[place - 1].command}".rstrip(": ")
                for place in cell.needs
            )
            comparable = "" if number is None else str(not cell.incomparable).lower()
            origin = filled.table.source if row.is_published else row.folder or _HERE
            writer.writerow(
                (
                    *(filled.table.name, row.stratum, row.label, origin),
                    *(field.head, field.measure, cell.text, *shown),
                    *(comparable, cell.incomparable, lacking),
                )
            )
    return out.getvalue()


def title(row: FilledRow) -> str:
    """What a row is called: its group, its system, and how many pictures are behind ours."""
    name = f"{row.stratum}, {row.label}" if row.stratum else row.label
    if row.is_published:
        return name
    return f"{name}, {_HERE}" + (f" (n = {row.n})" if row.n is not None else "")


def reasons(filled: FilledTable) -> dict[str, list[str]]:
    """Columns by why numbers of ours in them do not compare; those under "" do."""
    found: dict[str, list[str]] = {}
    for row in filled.rows:
        for field, cell in zip(filled.table.fields, row.cells, strict=True):
            if cell.number is not None:
                heads = found.setdefault(cell.incomparable, [])
                if field.head not in heads:
                    heads.append(field.head)
    return found


def as_page_table(filled: FilledTable) -> Table:
    """The same as a table of the report pages, which LaTeX is made of; † marks what differs."""
    rows = []
    for row in filled.rows:
        cells = tuple(Cell(cell.text + _OTHER * bool(cell.incomparable)) for cell in row.cells)
        rows.append(Row(title(row), cells, published=row.is_published))
    table = filled.table
    source = ". ".join(
        (
            table.source,
            *(
                f"{_OTHER}{', '.join(heads)}: {why}"
                for why, heads in reasons(filled).items()
                if why
            ),
        )
    )
    return Table(table.caption, source, "System", table.columns, tuple(rows))
