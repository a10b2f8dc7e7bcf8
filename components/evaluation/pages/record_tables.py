"""Tables of an evaluation's page that other commands measured: a judge's and a machine's."""

from __future__ import annotations

from collections.abc import Sequence

from components.evaluation.pages.report_page import Cell, Row, Table
from components.evaluation.paper_tables.records import Record

_TIMES = (
    ("seconds_per_image", "s / picture", 2),
    ("seconds_per_step", "s / step", 3),
    ("images_per_second", "pictures / s", 3),
    ("peak_gib", "peak GiB", 2),
)


def judge_tables(records: Sequence[Record]) -> list[Table]:
    """A table per judgement: the share of pairs won, with Wilson's interval."""
    tables = []
    for record in records:
        questions = tuple(dict.fromkeys(question for _, _, question in record.numbers))
        rows = []
        for system in record.systems:
            cells = []
            for question in questions:
                number = record.numbers.get((system, "", question))
                interval = (
                    ""
                    if number is None or number.low is None or number.high is None
                    else f"{number.low:.1f} to {number.high:.1f}, {number.n} pairs"
                )
                cells.append(Cell("–" if number is None else f"{number.value:.1f}", interval))
            rows.append(Row(system, tuple(cells)))
        caption = f"Pairs won in percent, ties half: {'; '.join(record.notes)}"
        tables.append(Table(caption, "", "System", questions, tuple(rows)))
    return tables


def runtime_tables(records: Sequence[Record]) -> list[Table]:
    """A table per machine: medians, smallest and largest seconds below."""
    tables = []
    for record in records:
        shown = [t for t in _TIMES if any(name == t[0] for _, _, name in record.numbers)]
        rows = []
        for system, size in dict.fromkeys((s, size) for s, size, _ in record.numbers):
            cells = []
            for measure, _, decimals in shown:
                number = record.numbers.get((system, size, measure))
                if number is None:
                    cells.append(Cell("–"))
                    continue
                interval = (
                    ""
                    if number.low is None or number.high is None
                    else f"{number.low:.{decimals}f} to {number.high:.{decimals}f}, n = {number.n}"
                )
                cells.append(Cell(f"{number.value:.{decimals}f}", interval))
            rows.append(Row(f"{system}, {size}", tuple(cells)))
        caption = f"Seconds and memory per picture (width x height): {'; '.join(record.notes)}"
        heads = tuple(head for _, head, _ in shown)
        tables.append(Table(caption, "", "System", heads, tuple(rows)))
    return tables
