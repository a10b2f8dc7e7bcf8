"""The command `ultraflux papers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.command_line import print_json, project_root, refusing

EPILOG = """Example: [bold]ultraflux papers[/], then upload papers/dataset and papers/model beside
the photographs and the weights. All that is said comes from lineage, tables and settings: run it
again after the pipeline."""


def papers(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("papers"),
    as_json: Annotated[bool, typer.Option("--json", help="The files as a JSON list.")] = False,
) -> None:
    """Write dataset card, Croissant file, model card, attribution and bill of materials."""
    from components.papers.facts import PapersIncomplete
    from components.settings.schema import SettingsError
    from flows.history.papers import write_papers

    root = project_root()
    with refusing(PapersIncomplete, SettingsError):
        written = write_papers(root, out)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)
