"""The command `ultraflux lineage`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import Json, print_json, project_root, refusing
from flows.commands.tables import terminal

if TYPE_CHECKING:
    from rich.tree import Tree

    from flows.history.lineage import Node

EPILOG = """Examples:

  ultraflux lineage data/generate/images/prompt00_256x256.png

  ultraflux lineage data/sample/mount-batok-java.jpg

  ultraflux lineage ultraflux-transformer@candidate

  ultraflux lineage dit_stage2 --json

A picture is known by the metadata inside it or by its sha256. Steps are joined by hashes, from run
records, dvc.lock and data/ of this clone, and from MLflow where it answers; what could not be found
is in the tree, with what brings it."""

_COLOURS = {
    "picture": "magenta",
    "weights": "yellow",
    "version": "green",
    "run": "cyan",
    "pipeline": "cyan",
    "slice": "blue",
    "row": "blue",
    "photograph": "bold",
    "missing": "red",
}


def lineage(
    target: Annotated[
        str,
        typer.Argument(
            help="A picture, a photograph, a weights folder, a run (MLflow id, record id or stage "
            "name), a model (name, name/3, name@alias) or a sha256.",
        ),
    ],
    limit: Annotated[int, typer.Option(min=1, help="Rows and pictures shown below one step.")] = 10,
    as_json: Json = False,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Ask the tracking server too.")
    ] = True,
) -> None:
    """Walk from a picture, model or run back to photographs, or from a photograph forward."""
    from flows.history.lineage import Lineage
    from flows.history.lineage_targets import TargetUnknown, explain
    from flows.history.run_evidence import Evidence
    from flows.history.run_history import NoPipeline

    evidence = Evidence(project_root(), mlflow=mlflow)
    with refusing(TargetUnknown, NoPipeline):
        node = explain(Lineage(evidence, limit=limit), target)
    if as_json:
        document = {"mlflow": evidence.mlflow_problem or "asked", **node.to_json()}
        print_json(document, default=str)
        return
    console = terminal(highlight=False)
    console.print(_tree(node))
    lost = [step for step in node.walk() if step.kind == "missing"]
    if lost:
        console.print(f"{len(lost)} steps could not be found (marked missing)", style="red")
    if evidence.mlflow_problem:
        console.print(f"MLflow: {evidence.mlflow_problem}", style="dim", markup=False)


def _tree(node: Node, parent: Tree | None = None) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    label = Text(f"{node.kind}  ", style=_COLOURS[node.kind])
    label.append(node.title, style="default")
    for line in _lines(node):
        label.append(f"\n  {line}", style="dim")
    tree = Tree(label) if parent is None else parent.add(label)
    for child in node.children:
        _tree(child, tree)
    return tree


def _lines(node: Node) -> list[str]:
    """Facts for the terminal: hashes cut to 16 digits, those of every file left to --json."""
    if "explained" in node.facts:
        return ["explained above"]
    from flows.history.lineage import PAST

    facts = {k: v for k, v in node.facts.items() if not isinstance(v, dict) and v not in ("", [])}
    if node.kind == "version":
        return []
    if node.kind in {"run", "pipeline"}:
        pairs = [
            ", ".join(f"{name} {_short(facts[name])}" for name in names if name in facts)
            for names in _RUN_LINES
        ]
        more = ("weights.", "accepted", *PAST)
        named = {k: v for k, v in facts.items() if k.startswith(more) or "encode" in k}
        return [pair for pair in pairs if pair] + [f"{k} {_short(v)}" for k, v in named.items()]
    return [f"{name}: {_short(value)}" for name, value in facts.items()]


_RUN_LINES = (
    ("started", "commit", "dirty"),
    ("settings_sha256", "packages_sha256", "dvc_lock_sha256"),
)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    if re.fullmatch(r"[0-9a-f]{32,64}", text):
        return text[:16]
    return text if len(text) <= 160 else f"{text[:157]}..."
