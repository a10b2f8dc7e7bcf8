"""The command `ultraflux history`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.command_line import print_json, project_root
from flows.commands.tables import terminal

EPILOG = """Examples:

  ultraflux history

  ultraflux history --limit 0 --html history.html

  ultraflux history --limit 0 --json

A run's record (its first word) is what `ultraflux compare` and `ultraflux lineage` take. Runs of
working trees (submitted with -S, sets of a sweep) are listed with the tree they ran in. While the
servers of `ultraflux up` run, the ids of MLflow and Prefect are links to their pages."""


def history(
    limit: Annotated[int, typer.Option(min=0, help="How many runs; 0: all.")] = 20,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a page with links there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List runs, whatever started them: state, commit, and where MLflow and Prefect have them."""
    from flows.history.run_history import run_history
    from flows.records.owners import close_ownerless
    from flows.records.trees import record_trees

    root = project_root()
    # What was killed must not read as running.
    for tree in record_trees(root):
        close_ownerless(tree)
    lines = list(run_history(root))
    shown = lines[:limit] if limit else lines
    if as_json:
        print_json([line.as_dict() for line in shown])
        return
    from flows.history.history_view import Uis, history_lines, history_page, shown_runs
    from flows.services.ui_addresses import mlflow_ui, prefect_ui

    uis = Uis(mlflow_ui(root), prefect_ui(root))
    runs = shown_runs(shown, uis)
    if html is not None:
        from components.files.whole_files import write_text

        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, history_page(root.resolve().name, runs, len(lines), uis), follow=True)
        print(html)
        return
    console = terminal(highlight=False)
    if not runs:
        console.print("no runs yet: ultraflux run")
    for line in history_lines(runs):
        console.print(line)
    if len(shown) < len(lines):
        console.print(f"{len(lines) - len(shown)} older runs: --limit 0 shows all")
