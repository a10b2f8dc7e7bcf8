"""A published table with what was measured here beside it, cell by cell.

Every cell of ours either has a number, with why it may or may not be compared with the printed one,
or names what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.evaluation.paper_tables.needs import ABLATION_SUITE, Need, needs_of
from components.evaluation.paper_tables.records import Number, Record
from components.evaluation.suites.suite_scores import infinite_note
from components.evaluation.suites.suites import not_of_suite
from components.metrics.cards import CARDS, card
from components.metrics.published import PublishedRow, PublishedTable

_METRICS = {c.id for c in CARDS}
_DECIMALS = 1
"""Of columns without a printed number and without a card."""


@dataclass(frozen=True)
class FilledCell:
    """A printed value, a number of ours, or what there must be for one."""

    text: str
    number: Number | None = None
    """Of ours."""
    incomparable: str = ""
    """Of a number of ours: why it does not compare with the column; empty where it does."""
    needs: tuple[int, ...] = ()
    """Numbers (from 1) of `FilledTable.needs`, of a cell without a number."""


@dataclass(frozen=True)
class FilledRow:
    """A printed row, or what stands under it."""

    label: str
    stratum: str
    is_published: bool
    cells: tuple[FilledCell, ...]
    folder: str = ""
    """Where the numbers of ours are from."""
    n: int | None = None
    """Most pictures, pairs or repeats behind a number of the row."""


@dataclass(frozen=True)
class FilledTable:
    """A published table and ours."""

    table: PublishedTable
    rows: tuple[FilledRow, ...]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]
    """What a reader must know of the numbers of ours."""

    @property
    def measured(self) -> int:
        """Cells of ours with a number."""
        return sum(cell.number is not None for row in self.rows for cell in row.cells)

    @property
    def open_cells(self) -> int:
        """Cells of ours without one."""
        return sum(bool(cell.needs) for row in self.rows for cell in row.cells)


def _decimals(table: PublishedTable, place: int) -> int:
    """As many as the column prints; else those of the metric's card."""
    printed = [row.values[place].partition(".")[2] for row in table.rows]
    digits = [len(part) for part in printed if part.isdecimal()]
    if digits:
        return max(digits)
    measure = table.fields[place].measure
    return card(measure).decimals if measure in _METRICS else _DECIMALS


def _shown(number: Number, measure: str, decimals: int) -> str:
    value = f"{number.value:.{decimals}f}" if math.isfinite(number.value) else ""
    if value and number.low is not None and number.high is not None:
        value += f" [{number.low:.{decimals}f}, {number.high:.{decimals}f}]"
    if not number.infinite:
        return value
    note = infinite_note(measure, number.infinite, number.n or 0)
    return f"∞ ({note}; {value} over the others)" if value else f"∞ ({note})"


def _incomparable(table: PublishedTable, row: PublishedRow, place: int, record: Record) -> str:
    field = table.fields[place]
    if table.filling == "runtime":
        return f"measured on {record.notes[0]}; paper: {field.script}"
    if table.filling == "judge":
        asked = record.protocols.get(field.measure) or "in our own words"
        return f"asked {asked} ({record.notes[0]}); paper: {field.script}"
    suite = ABLATION_SUITE if table.filling == "ablation" else table.suite
    if reason := not_of_suite(suite, record.suite, record.protocol):
        return reason
    if sizes := record.other_sizes.get(row.system):
        return f"not at the suite's sizes: {sizes}"
    if row.stratum not in table.strata:
        return f"a group that the table lacks: {row.stratum}"
    return table.comparison(place, record.protocols.get(field.measure, ""))


class _Needs:
    """Needs of all cells, each once, in the order of their first cell."""

    def __init__(self) -> None:
        self.listed: dict[Need, int] = {}

    def number(self, need: Need) -> int:
        return self.listed.setdefault(need, len(self.listed) + 1)


def fill(table: PublishedTable, records: Sequence[Record], root: Path) -> FilledTable:
    """Put what was measured under the printed rows; systems that a paper lacks come last.

    Args:
        table: the published one.
        records: in order; of two with a number for one cell the later counts.
        root: of the project, for what an empty cell needs.
    """
    needs = _Needs()
    rows: list[FilledRow] = []
    printed = {row.system for row in table.rows}
    theirs = table.strata
    ours = {
        stratum
        for record in records
        for _, stratum, measure in record.numbers
        if measure in table.metrics and stratum and theirs != ("",)
    }
    for stratum in (*theirs, *sorted(ours - set(theirs))):
        for row in (row for row in table.rows if row.stratum == stratum):
            cells = tuple(FilledCell(value or "–") for value in row.values)
            rows.append(FilledRow(row.label, stratum, is_published=True, cells=cells))
            rows.append(_ours(table, row, records, root, needs))
        further = dict.fromkeys(
            system
            for record in records
            for system, group, measure in record.numbers
            if group == stratum and measure in table.metrics
            if system not in printed or stratum not in theirs
        )
        for system in further:
            other = PublishedRow(system, (), stratum, system)
            rows.append(_ours(table, other, records, root, needs, ask=False))
    notes = [
        f"{record.folder.name}: {note}"
        for record in records
        for note in (*record.notes, *_sampled(record))
    ]
    return FilledTable(table, tuple(rows), tuple(needs.listed), tuple(notes))


def _sampled(record: Record) -> list[str]:
    """How the systems of a record sampled, as far as anything was asked."""
    asked = {name: value for name, value in record.asked.items() if value not in (None, "", False)}
    return [", ".join(f"{name} {value}" for name, value in asked.items())] if asked else []


def _ours(
    table: PublishedTable,
    row: PublishedRow,
    records: Sequence[Record],
    root: Path,
    needs: _Needs,
    *,
    ask: bool = True,
) -> FilledRow:
    """What stands under a printed row; `ask`: an empty cell says what it needs."""
    cells: list[FilledCell] = []
    known = [one for one in records if row.system in one.systems]
    used: list[Record] = []
    for place, measure in enumerate(table.metrics):
        key = row.system, row.stratum, measure
        record = next((one for one in reversed(known) if key in one.numbers), None)
        if record is not None:
            number = record.numbers[key]
            text = _shown(number, measure, _decimals(table, place))
            why = _incomparable(table, row, place, record)
            cells.append(FilledCell(text, number, why))
            used.append(record)
        elif ask:
            last = known[-1] if known else None
            lacking = needs_of(table, row, measure, last, root)
            cells.append(FilledCell("–", needs=tuple(needs.number(need) for need in lacking)))
        else:
            cells.append(FilledCell("–"))
    folders = dict.fromkeys(str(record.folder) for record in used)
    counts = [cell.number.n for cell in cells if cell.number and cell.number.n is not None]
    return FilledRow(
        row.system,
        row.stratum,
        False,
        tuple(cells),
        "; ".join(folders),
        max(counts, default=None),
    )
