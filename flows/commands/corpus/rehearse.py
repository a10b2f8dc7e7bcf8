"""`ultraflux corpus rehearse`: what a run over the whole source would meet, on a sample."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, project_root, refusing
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from flows.pipeline.rehearsal import Rehearsal

LEFT_OUT = "ULTRAFLUX_NO_REHEARSAL"
"""Environment variable: `dvc repro` reads a large new source without a rehearsal."""
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
    from flows import environment
    from flows.pipeline import rehearsal

    root = project_root()
    environment.prepare(offline=True)
    with refusing(ValueError, OSError):
        found = rehearsal.rehearse(root, items)
    rehearsal.write_outcome(root, found)
    _show(found)
    if (problem_line := found.problem) is not None:
        raise fail(f"rehearsal of {found.items} items: {problem_line}", 1)


def before_stage(name: str, root: Path) -> None:
    """Rehearse before a plain `dvc repro` reads a large new source, as `ultraflux run` does.

    At `ingest`: the first stage that DVC starts only when it has something to do.

    Raises:
        typer.Exit: a stage would fail; one line was printed.
    """
    # DVC names the stage that it runs.
    if name != "ingest" or "DVC_STAGE" not in os.environ or os.environ.get(LEFT_OUT):
        return
    from components.settings.schema import SettingsError, load_settings
    from flows.pipeline.rehearsal import RehearsalFailed, rehearse_if_due
    from flows.running.recorded_stage import OUTCOME_FILE

    # A run that started DVC waits for an outcome, and has rehearsed.
    if OUTCOME_FILE in os.environ:
        return
    try:
        settings = load_settings(root / "params.yaml")
        rehearse_if_due(root, settings, otherwise=f"{LEFT_OUT}=1")
    except SettingsError:
        # The stage says the same, and keeps a record of it.
        return
    except RehearsalFailed as problem:
        raise fail(str(problem)) from None


def _show(found: Rehearsal) -> None:
    whole = "an unknown number of" if found.total is None else f"{found.total:,}"
    cells = (
        (
            stage.stage,
            f"{stage.seconds:.1f}",
            *("-" if rows is None else str(rows) for rows in (stage.rows_in, stage.rows_out)),
            "-" if (projected := found.projected_s(stage)) is None else f"{projected / 3600:.2f}",
            {"ok": stage.said, "failed": f"FAILS  {stage.said}"}.get(stage.status, stage.status),
        )
        for stage in found.stages
    )
    console = terminal(file_width=160)
    console.print(f"{found.items} of {whole} items")
    console.print(table_of(("stage", "s", "rows in", "out", "all, h", "said"), cells))
    rows = sum(found.rejected.values())
    for reason, number in found.rejected.items():
        console.print(f"  {reason:<16} {number:>5}  {number / rows:.0%}")
