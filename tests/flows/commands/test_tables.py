"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from flows.commands.tables import table_of


def printed(table: object, width: int = 40) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_brackets_are_text_wherever_they_stand() -> None:
    shown = printed(table_of(["[bold]a", "b"], [["[red]x", Text("[/]")]], title="[dim]t"))
    for text in ("[bold]a", "[red]x", "[/]", "[dim]t"):
        assert text in shown


def test_cells_move_no_cursor() -> None:
    assert r"a\x1b[2J" in printed(table_of(["a"], [["a\x1b[2J"]]))


def test_columns_that_are_not_at_the_left_end_at_the_right() -> None:
    shown = printed(table_of(["name", "number"], [["a", "1"]], left=(0,)))
    assert "│ a    │      1 │" in shown


def test_a_folded_cell_goes_on_where_another_is_cut_off() -> None:
    long = "x" * 60
    assert printed(table_of(["a"], [[long]], folded=(0,))).count("x") == 60
    assert printed(table_of(["a"], [[long]], whole=(0,))).count("x") < 60
