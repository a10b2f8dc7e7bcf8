"""The command `ultraflux ablate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from components.files.whole_files import write_text
from flows.commands.command_line import fail, project_root, refusing
from flows.records.trees import ABLATE, tree_place

if TYPE_CHECKING:
    from pathlib import Path

    from components.evaluation.suites.ablation import Arm

EPILOG = """Examples:

  ultraflux ablate ladder --dry-run

  ultraflux ablate ladder --suite aesthetic-eval-4096

  ultraflux ablate data-model --arm a-baseline --arm d-full"""


def ablate(
    design: Annotated[str, typer.Argument(help="ladder or data-model.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="Only these arms, by name (default: all).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameter sets and stages, run nothing.")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Measure every arm's model on this suite of `ultraflux evaluate`; default: the "
            "pipeline's own scores."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Of the suite, as of `ultraflux evaluate`.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the suite's first items of each stratum.")
    ] = None,
) -> None:
    """Run an ablation of the papers as pipeline runs, and print its table beside theirs.

    Arms share what they have in common. One that fails costs its own row: the others run, the table
    says which is missing, and the same command goes on with it (exit code 1 until all are there).
    """
    from components.evaluation.suites.ablation import DESIGNS, Design, expand

    root = project_root()
    if design not in DESIGNS:
        raise fail(f"design '{design}': choose {' or '.join(DESIGNS)}")
    from components.evaluation.suites.ablation_table import ablation_table
    from components.settings.schema import load_settings
    from flows.experiments.ablation_runs import SuiteChoice, run_arm
    from flows.running.working_trees import TreeRefused
    from flows.versioning.setting_overrides import read_params

    if suite is None and (metrics, limit) != (None, None):
        raise fail("--metrics and --limit belong to a suite; add --suite")
    chosen_design: Design = "ladder" if design == "ladder" else "data-model"
    with refusing(ValueError):
        load_settings(root / "params.yaml")
        arms = expand(chosen_design, read_params(root))
    known = [one.name for one in arms]
    if unknown := sorted(set(arm or ()) - set(known)):
        raise fail(f"--arm {unknown[0]}: {design} has {', '.join(known)}")
    arms = tuple(one for one in arms if not arm or one.name in arm)
    if suite is not None:
        _check_suite(root, suite, metrics)
    if dry_run:
        _show_plan(root, arms)
        return
    choice = None if suite is None else SuiteChoice(suite, metrics, limit)
    scores = []
    with refusing(TreeRefused, code=1):
        for number, one in enumerate(arms, start=1):
            print(f"arm {number} of {len(arms)}: {one.name} ({one.label})", flush=True)
            scores.append(run_arm(root, chosen_design, one, choice))
    seed = int(read_params(root)["project"]["seed"])
    table = ablation_table(chosen_design, scores, resamples=2000, seed=seed)
    target = tree_place(root, ABLATE, design) / "table.md"
    write_text(target, table)
    print(table)
    print(f"Table: {target}")
    if failed := [one.arm.name for one in scores if one.problem]:
        raise fail(
            f"{len(failed)} of {len(arms)} arms did not finish: {', '.join(failed)}; run the same "
            "command to go on",
            1,
        )


def _check_suite(root: Path, suite: str, metrics: str | None) -> None:
    """Refuse before any arm is trained what its measurement would refuse afterwards.

    Raises:
        typer.Exit: no such suite, no local copy, or an unknown metric.
    """
    from components.evaluation.suites.suites import HELD_OUT, RUNTIME, load_suite
    from flows.commands.images.evaluate import metric_ids

    with refusing(ValueError):
        if suite == RUNTIME:
            raise ValueError(f"suite '{suite}': times systems, it scores no pictures")
        # The arms' own runs make what is held out.
        default = () if suite == HELD_OUT else load_suite(suite, root).metrics
        metric_ids(metrics, default)


def _show_plan(root: Path, arms: tuple[Arm, ...]) -> None:
    """Parameter sets, and the stages that each arm is the first to run."""
    from flows.experiments.ablation_runs import plan

    for name, makers in plan(root, arms).items():
        one = next(one for one in arms if one.name == name)
        print(f"{name}: {one.label}")
        print("  " + ("\n  ".join(one.arguments) or "params.yaml as it stands"))
        own = [stage for stage, maker in makers.items() if maker == name]
        print(f"  runs at most: {', '.join(own) or 'nothing'}")
