"""The command `ultraflux clean`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.command_line import fail, print_json, project_root, refusing

EPILOG = """Examples:

  ultraflux clean

  ultraflux clean --runs

Without --runs it only lists. Results stay: they are in DVC's cache (`dvc gc` is for that), records
and MLflow's database stay, and so does training that is unfinished."""


def clean(
    runs: Annotated[bool, typer.Option("--runs", help="Remove what is listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List what lies below runs/ that nothing needs, with sizes; remove it with --runs."""
    from flows.running.leftovers import leftovers, remove
    from flows.versioning.graph import GraphError

    root = project_root()
    with refusing(GraphError):
        found = leftovers(root)
    gone = [one for one in found if runs and remove(root, one)]
    total = sum(one.size_bytes for one in (gone if runs else found)) / 2**20
    if as_json:
        print_json([one.as_dict() | {"removed": one in gone} for one in found])
    else:
        for one in found:
            print(f"{one.size_bytes / 2**20:10.1f} MiB  {one.path}  ({one.kind}: {one.reason})")
        if not found:
            print("nothing to clean below runs/")
        elif runs:
            print(f"{len(gone)} removed, {total:.1f} MiB freed")
        else:
            print(f"{len(found)} can go, {total:.1f} MiB: ultraflux clean --runs")
    if runs and (left := [one.path for one in found if one not in gone]):
        raise fail("\n".join(f"{path} could not be removed: look who owns it" for path in left), 1)
