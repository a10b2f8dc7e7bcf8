"""The command `ultraflux reproduce`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import Json, fail, print_json, project_root, refusing
from flows.commands.tables import table_of, terminal
from flows.records.trees import REPRODUCE, tree_place

if TYPE_CHECKING:
    from flows.experiments.reproduction import StageComparison

EPILOG = """Examples:

  ultraflux reproduce pipeline-a32bbb371b71

  ultraflux reproduce pipeline --recompute --stage select --stage slices

  ultraflux reproduce HEAD~2 --recompute --into ../again

A run is a pipeline's record id, an MLflow run id, a stage's run (its pipeline is taken), `pipeline`
(the newest), or a Git revision with a dvc.lock. Results in the DVC cache are restored unless
--recompute. Exit code 0: every output is equal; 1: something differs or failed."""


def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="See below.")],
    into: Annotated[
        Path | None,
        typer.Option(help="New folder for the working tree (default: runs/reproduce/RUN)."),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute anew what the DVC cache already has.")
    ] = False,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="With --recompute: only this stage; may be given several times."),
    ] = None,
    as_json: Json = False,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Look for the run there too.")
    ] = True,
) -> None:
    """Run a past run again at its commit, settings and lock, and compare what comes out."""
    from flows.experiments import reproduction
    from flows.history.run_evidence import Evidence
    from flows.running.clone_lock import tree_lock
    from flows.versioning.graph import locked_stages

    if stage and not recompute:
        raise fail("--stage needs --recompute: without it everything in the cache is restored")
    root = project_root()
    with refusing(reproduction.ReproductionRefused):
        recorded = reproduction.find_recorded(Evidence(root, mlflow=mlflow), run)
        known = locked_stages(recorded.lock.decode())
        if unknown := sorted(set(stage or ()) - set(known)):
            raise fail(f"--stage {unknown[0]}: the run has {', '.join(known)}")
        tree = (into or tree_place(root, REPRODUCE, recorded.name.replace("/", "-"))).resolve()
        # `ultraflux clean` looks for trees there alone.
        ours = tree.parent == tree_place(root, REPRODUCE).resolve()
        with tree_lock(tree, _say) if ours else nullcontext():
            warnings = reproduction.set_up(root, recorded, tree)
            for warning in warnings:
                _say(f"warning: {warning}")
            ended_well = reproduction.run_again(
                root, recorded, tree, recompute=recompute, stages=stage or ()
            )
            compared = reproduction.compare_locks(recorded, tree)
    equal = all(one.verdict == "equal" for one in compared)
    if as_json:
        print_json(_as_dict(recorded.name, tree, warnings, compared))
    else:
        _show(compared)
        print(f"Tree: {tree}  (remove it: git worktree remove --force {tree})")
    if not ended_well:
        print("error: not every stage ended; see above", file=sys.stderr)
    raise typer.Exit(0 if equal and ended_well else 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _as_dict(
    name: str, tree: Path, warnings: list[str], compared: list[StageComparison]
) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "run": name,
        "tree": str(tree),
        "equal": all(one.verdict == "equal" for one in compared),
        "warnings": warnings,
        "stages": [asdict(one) for one in compared],
    }


def _show(compared: list[StageComparison]) -> None:
    console = terminal(highlight=False)
    rows = []
    for one in compared:
        paths = [
            f"{path}: {a[:8] or '-'} -> {b[:8] or '-'}" for path, (a, b) in one.outputs.items()
        ]
        if one.outputs:
            inputs = ", ".join(one.inputs) or "none: the stage itself gave other bytes"
            paths.append(f"inputs that differ: {inputs}")
        rows.append((one.stage, one.verdict, one.how, "\n".join(paths)))
    console.print(table_of(("stage", "outputs", "how", "what differs"), rows))
    counts = {
        how: sum(one.how == how for one in compared if one.verdict == "equal")
        for how in ("computed", "restored")
    }
    differing = sum(one.verdict != "equal" for one in compared)
    console.print(
        f"{counts['computed']} stages computed again with equal outputs, "
        f"{counts['restored']} restored from the cache, {differing} differ or are missing"
    )
