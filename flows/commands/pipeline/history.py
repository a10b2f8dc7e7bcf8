"""The command `ultraflux history`."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from flows.commands.command_line import project_root

EPILOG = """Examples:

  ultraflux history

  ultraflux history --limit 0 --json

A run's record (first column) is what `ultraflux compare` and `ultraflux lineage` take. Runs of
working trees (submitted with -S, sets of a sweep) are listed with the tree they ran in."""


def history(
    limit: Annotated[int, typer.Option(min=0, help="How many runs; 0: all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List runs, whatever started them: state, commit, and where MLflow and Prefect have them."""
    from flows.history.run_history import run_history
    from flows.records.owners import close_ownerless

    root = project_root()
    # What was killed must not read as running.
    close_ownerless(root)
    lines = list(run_history(root))
    shown = lines[:limit] if limit else lines
    if as_json:
        print(json.dumps([line.as_dict() for line in shown], indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("record", no_wrap=True)
    for heading in ("state", "started", "took", "engine", "commit", "MLflow", "Prefect", "result"):
        table.add_column(heading, overflow="fold")
    for line in shown:
        where = f"in {line.tree}: " if line.tree else ""
        seconds = 0.0 if line.seconds is None else line.seconds
        table.add_row(
            line.record,
            line.status.lower(),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(line.started_ms / 1000)),
            f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s",
            line.experiment or line.engine,
            line.commit[:8] + ("+" if line.is_dirty else ""),
            line.mlflow_run[:8],
            line.prefect_run[:8],
            (where + line.summary).replace("[", "\\["),
        )
    console = Console()
    console.print(table if shown else "no runs yet: ultraflux run")
    if len(shown) < len(lines):
        console.print(f"{len(lines) - len(shown)} older runs: --limit 0 shows all")
