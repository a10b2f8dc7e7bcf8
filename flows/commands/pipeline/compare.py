"""The command `ultraflux compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.command_line import Json, print_json, project_root, refusing
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """Examples:

  ultraflux compare pipeline-a32bbb371b71 workspace

  ultraflux compare HEAD~3 HEAD --json

A run is an MLflow run id, a record id below runs/records, `pipeline` or a stage name (their
newest run), a git revision, or `workspace`. Exit code 1: something differs."""


def compare(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="See below.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="See below.")],
    as_json: Json = False,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Ask the tracking server too.")
    ] = True,
) -> None:
    """Say what differs between two runs: code, data, settings, metrics, environment."""
    from flows.history.run_comparison import SideUnknown, find_side
    from flows.history.run_comparison import compare as measure
    from flows.history.run_evidence import Evidence
    from flows.history.run_history import NoPipeline

    evidence = Evidence(project_root(), mlflow=mlflow)
    with refusing(SideUnknown, NoPipeline):
        sides = find_side(evidence, before), find_side(evidence, after)
    found = measure(evidence, *sides)
    if as_json:
        from components.evaluation.suites.result_folder import finite

        plain = finite(json.loads(json.dumps(found, default=str)))
        print_json(plain)
    else:
        _show(terminal(highlight=False), found)
    parts = ("data", "settings", "metrics", "environment", "packages")
    differs = not found["code"]["equal"] or any(found[part] for part in parts)
    raise typer.Exit(1 if differs else 0)


def _show(console: Console, found: dict[str, Any]) -> None:
    from rich.markup import escape

    first, second = found["runs"]
    code = found["code"]
    console.print(f"[bold]code[/]: {'equal' if code['equal'] else 'differs'}")
    for name in ("commit", "dirty", "diff_sha256"):
        if code[name][0] != code[name][1]:
            console.print(f"  {name}: {_short(code[name][0])} -> {_short(code[name][1])}")
    for line in code["stat"]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    for part in ("settings", "data", "environment", "packages"):
        rows = [(name, _short(a), _short(b)) for name, (a, b) in found[part].items()]
        if part == "data" and found["without_data"]:
            missing = " and ".join(found["without_data"])
            console.print(f"[bold]data[/]: not known for {escape(missing)} (no dvc.lock there)")
            if not rows or len(found["without_data"]) == 2:
                continue
        _table(console, part, (part, first, second), rows)
    if found["corpus"]:
        _show_corpus(console, found["corpus"])
    numbers = [
        (name, _number(c["before"]), _number(c["after"]), _number(c["difference"]), c["verdict"])
        for name, c in found["metrics"].items()
    ]
    _table(console, "metrics", ("metric", first, second, "difference", ""), numbers)


def _table(
    console: Console, part: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> None:
    if not rows:
        console.print(f"[bold]{part}[/]: equal")
        return
    console.print(table_of(columns, rows, title=f"{part}: {len(rows)} differ"))


def _show_corpus(console: Console, corpus: dict[str, Any]) -> None:
    if "problem" in corpus:
        console.print(f"corpus ({corpus['manifest']}): {corpus['problem']}")
        return
    kept, rows = corpus["kept"], corpus["rows"]
    changes = ", ".join(f"{kind} {number}" for kind, number in corpus["changes"].items() if number)
    console.print(
        f"[bold]corpus[/] ({corpus['manifest']}): rows {rows[0]} -> {rows[1]}, "
        f"kept {kept[0]} -> {kept[1]}; {changes or 'no row differs'}",
        soft_wrap=True,
    )


def _short(value: object) -> str:
    text = "-" if value is None or value == "" else str(value)
    # Digests of 32 or more digits are told apart by their first.
    return text[:12] if len(text) >= 32 and " " not in text and "/" not in text else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
