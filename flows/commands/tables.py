"""Tables in the terminal: what stands in them is text, never markup."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def terminal(
    *, soft_wrap: bool = False, highlight: bool = True, file_width: int | None = None
) -> Console:
    """Where tables and coloured lines are printed.

    Args:
        soft_wrap: lines are as long as they are.
        highlight: numbers and paths have colours.
        file_width: columns where the output is no terminal; None: as many as rich takes.
    """
    from rich.console import Console

    in_file = file_width is not None and not Console().is_terminal
    return Console(soft_wrap=soft_wrap, highlight=highlight, width=file_width if in_file else None)


def table_of(
    columns: Sequence[str],
    rows: Iterable[Iterable[str | Text]],
    *,
    title: str | None = None,
    left: Container[int] | None = None,
    whole: Container[int] = (),
    folded: Container[int] = (),
) -> Table:
    """A table of rich, for its console to print.

    Args:
        columns: headings.
        rows: a cell for each column; brackets in strings are brackets, colours come as Text.
        title: above the table, at its left.
        left: positions of the columns that start at the left, the others end at the right;
            None: all.
        whole: positions of the columns that no line break goes through.
        folded: positions of the columns that go on in the next line where they would be cut off.
    """
    from rich.markup import escape
    from rich.table import Table

    from components.telemetry.wording import legible_lines

    table = Table(title=None if title is None else escape(title), title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(
            escape(column),
            justify="left" if left is None or position in left else "right",
            no_wrap=position in whole,
            overflow="fold" if position in folded else "ellipsis",
        )
    for row in rows:
        table.add_row(
            *(escape(legible_lines(cell)) if isinstance(cell, str) else cell for cell in row)
        )
    return table
