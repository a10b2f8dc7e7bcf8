"""`ultraflux paper`: the papers' tables with what was measured here beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.files.whole_files import write_text
from flows.commands.command_line import print_json, refusing, workplace
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.evaluation.paper_tables.filled import FilledTable

app = typer.Typer(no_args_is_help=True, help="The papers' tables, and ours beside them.")
EPILOG = """Examples:

  ultraflux paper table

  ultraflux paper table main

  ultraflux paper table aspect-ratios --from runs/evaluations/aspect-ratio --latex aspect.tex

  ultraflux paper table runtime --json"""


@app.command("table", epilog=EPILOG)
def table(
    name: Annotated[str | None, typer.Argument(help="Of a table; without it they are listed.")] = (
        None
    ),
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Folder of `ultraflux evaluate`, its runtime suite, `judge`, or an arm of "
            "`ablate`; repeatable. Default: what these commands left at their own places.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every reason.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also as CSV, a row per cell.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Also as a LaTeX table.")] = None,
) -> None:
    """A table of the papers: printed numbers, ours beneath, and what an empty cell needs.

    Nothing is measured. Numbers compare only where suite and protocol ids are equal; the others say
    why not.
    """
    from components.evaluation.pages.table_export import as_latex
    from components.evaluation.paper_tables.export import as_csv, as_page_table
    from components.evaluation.paper_tables.export import as_json as described
    from components.evaluation.paper_tables.filled import fill
    from components.evaluation.paper_tables.records import default_records, given_records
    from components.metrics.paper_tables import paper_table

    root = workplace()
    if name is None:
        _list(as_json)
        return
    with refusing(ValueError):
        chosen = paper_table(name)
        records = given_records(chosen, from_) if from_ else default_records(chosen, root)
    filled = fill(chosen, records, root)
    for path, text in (
        (csv, lambda: as_csv(filled)),
        (latex, lambda: as_latex([as_page_table(filled)])),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text(), follow=True)
    if as_json:
        print_json(described(filled))
        return
    _show(filled)
    for path in (csv, latex):
        if path is not None:
            print(f"Table: {path}")


def _list(as_json: bool) -> None:
    from components.metrics.paper_tables import TABLES

    rows: list[dict[str, Any]] = [
        {
            "table": one.name,
            "source": one.source,
            "caption": one.caption,
            "fills": f"{one.filling} {one.suite}".strip(),
            "numbers": sum(bool(value) for row in one.rows for value in row.values),
        }
        for one in TABLES
    ]
    if as_json:
        print_json(rows)
        return
    cells = (
        (one["table"], str(one["numbers"]), one["fills"], f"{one['caption']} ({one['source']})")
        for one in rows
    )
    columns = ("table", "numbers", "filled by", "what")
    shown = table_of(columns, cells, whole=(0,), folded=range(len(columns)))
    shown.box = None
    terminal().print(shown)


def _show(filled: FilledTable) -> None:
    from components.evaluation.paper_tables.export import reasons, title

    console = terminal()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"{filled.table.caption} ({filled.table.source})")
    columns = ("system", *filled.table.columns)
    lines = (
        (
            title(row),
            *(
                f"{cell.text} ({','.join(map(str, cell.needs))})" if cell.needs else cell.text
                for cell in row.cells
            ),
        )
        for row in filled.rows
    )
    shown = table_of(columns, lines, left=(0,), folded=range(len(columns)))
    for made, row in zip(shown.rows, filled.rows, strict=True):
        made.style = "dim" if row.is_published else None
    console.print(shown)
    for why, heads in reasons(filled).items():
        named = ", ".join(heads)
        say(f"not comparable: {named}: {why}" if why else f"equal protocol ids: {named}")
    if filled.table.wants:
        say(f"made with: {filled.table.wants}")
    for note in filled.notes:
        say(f"note: {note}")
    if filled.open_cells:
        for line in filled.table.needs:
            say(f"needs: {line}")
    for number, need in enumerate(filled.needs, start=1):
        say(f"({number}) {need.what}{': ' if need.command else ''}{need.command}")
    say(f"{filled.measured} cells measured here, {filled.open_cells} open")
