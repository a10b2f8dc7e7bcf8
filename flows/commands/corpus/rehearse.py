"""`ultraflux corpus rehearse`: what a run over the whole source would meet, on a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, project_root

if TYPE_CHECKING:
    from flows.pipeline.rehearsal import Rehearsal

EPILOG = (
    "Example: [bold]ultraflux corpus rehearse -n 20[/]. `ultraflux run` does it by itself before "
    "it reads a source of more than 300 items for the first time."
)


def rehearse(
    items: Annotated[
        int, typer.Option("--items", "-n", min=1, help="Photographs or records to take.")
    ] = 100,
) -> None:
    """Run every corpus stage over a sample of the source, beside `data/` (exit 1: one failed)."""
    from components.settings.schema import SettingsError
    from flows import environment
    from flows.pipeline import rehearsal
    from flows.versioning.graph import GraphError

    root = project_root()
    environment.prepare(offline=True)
    try:
        found = rehearsal.rehearse(root, items)
    except (SettingsError, GraphError, ValueError, OSError) as problem:
        raise fail(str(problem)) from None
    rehearsal.write_outcome(root, found)
    _show(found)
    if (problem_line := found.problem) is not None:
        raise fail(f"rehearsal of {found.items} items: {problem_line}", 1)


def _show(found: Rehearsal) -> None:
    from rich.console import Console
    from rich.table import Table

    whole = "an unknown number of" if found.total is None else f"{found.total:,}"
    table = Table("stage", "s", "rows in", "out", "all, h", "said")
    for stage in found.stages:
        projected = found.projected_s(stage)
        table.add_row(
            stage.stage,
            f"{stage.seconds:.1f}",
            *("-" if rows is None else str(rows) for rows in (stage.rows_in, stage.rows_out)),
            "-" if projected is None else f"{projected / 3600:.2f}",
            {"ok": stage.said, "failed": f"FAILS  {stage.said}"}.get(stage.status, stage.status),
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{found.items} of {whole} items")
    console.print(table)
    rows = sum(found.rejected.values())
    for reason, number in found.rejected.items():
        console.print(f"  {reason:<16} {number:>5}  {number / rows:.0%}")
