"""`ultraflux weights`: which weights the metrics need, which are there, and whether they are right.

Nothing is fetched: the table names the command that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, project_root

if TYPE_CHECKING:
    from components.metrics.metric_weights import Weights

app = typer.Typer(no_args_is_help=True, help="Weights of learned metrics: list and verify them.")
_COLOURS = {"ok": "green", "recorded": "green", "unchecked": "yellow", "wrong": "red"}


def _needed(wanted: list[str] | None) -> Iterator[tuple[str, Weights]]:
    """(names of the metrics, weights), each file or folder once."""
    from components.metrics.cards import CARDS, card
    from components.metrics.weight_files import parts

    cards = CARDS if not wanted else tuple(card(metric) for metric in wanted)
    users: dict[str, list[str]] = {}
    files: dict[str, Weights] = {}
    for metric in cards:
        for part in parts(metric.weights) if metric.weights is not None else ():
            files.setdefault(part.path, part)
            users.setdefault(part.path, []).append(metric.name)
    for path, part in files.items():
        yield ", ".join(users[path]), part


@app.command(
    "list", epilog="Example: [bold]ultraflux weights list[/] or [bold]... list fid clip_score[/]"
)
def list_weights(
    metrics: Annotated[list[str] | None, typer.Argument(help="Metric ids; all if none.")] = None,
) -> None:
    """Metrics, their files, size, licence, whether they are there, and the command for them."""
    from rich.console import Console
    from rich.markup import escape

    from components.metrics.weight_files import state

    weights_dir = project_root() / "weights"
    console = Console(soft_wrap=True)
    try:
        rows = [(names, part, state(names, part, weights_dir)) for names, part in _needed(metrics)]
    except ValueError as problem:
        raise fail(str(problem)) from None
    for names, part, found in rows:
        colour = _COLOURS.get(found, "yellow")
        console.print(f"[{colour}]{found:9}[/] [bold]{escape(names)}[/]")
        console.print(f"          weights/{part.path}  ({part.size}; {escape(part.license)})")
        if found == "missing":
            console.print(f"          {escape(part.command)}")
    there = sum(found != "missing" for _, _, found in rows)
    console.print(f"{there} of {len(rows)} are there.")


@app.command("verify", epilog="Example: [bold]ultraflux weights verify fid[/]")
def verify_weights(
    metrics: Annotated[list[str] | None, typer.Argument(help="Metric ids; all if none.")] = None,
) -> None:
    """Hash what is there, compare with file names and with weights/digests.json, record the rest.

    Exits with 1 where a file is not what it was, or where one that was asked for is missing.
    """
    from components.metrics.weight_files import verify

    weights_dir = project_root() / "weights"
    bad = checked = 0
    try:
        for names, part in _needed(metrics):
            verdict = verify(names, part, weights_dir)
            if verdict.state == "missing" and not metrics:
                continue
            print(f"{verdict.state:9} weights/{verdict.path}: {verdict.detail}", flush=True)
            checked += verdict.state != "missing"
            bad += verdict.state in {"wrong", "missing"}
    except ValueError as problem:
        raise fail(str(problem)) from None
    print(f"{checked} verified, {bad} wrong or missing.")
    if bad:
        raise typer.Exit(1)
