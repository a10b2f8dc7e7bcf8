"""The command `ultraflux ablate`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.command_line import fail, project_root

EPILOG = """Examples:

  ultraflux ablate ladder --dry-run

  ultraflux ablate data-model --arm a-baseline --arm d-full"""


def ablate(
    design: Annotated[str, typer.Argument(help="ladder or data-model.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="Only these arms, by name (default: all).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameter sets and stages, run nothing.")
    ] = False,
) -> None:
    """Run an ablation of the papers as pipeline runs, and print its table beside theirs."""
    from components.evaluation.ablation import DESIGNS, Design, expand
    from components.settings import SettingsError
    from flows.ablation import AblationFailed, ablation_table, plan, run_arm
    from flows.setting_overrides import read_params

    root = project_root()
    if design not in DESIGNS:
        raise fail(f"design '{design}': choose {' or '.join(DESIGNS)}")
    chosen_design: Design = "ladder" if design == "ladder" else "data-model"
    try:
        arms = expand(chosen_design, read_params(root))
    except (SettingsError, ValueError) as problem:
        raise fail(str(problem)) from None
    known = [one.name for one in arms]
    if unknown := sorted(set(arm or ()) - set(known)):
        raise fail(f"--arm {unknown[0]}: {design} has {', '.join(known)}")
    arms = tuple(one for one in arms if not arm or one.name in arm)
    if dry_run:
        for name, makers in plan(root, arms).items():
            one = next(one for one in arms if one.name == name)
            print(f"{name}: {one.label}")
            print("  " + ("\n  ".join(one.arguments) or "params.yaml as it stands"))
            own = [stage for stage, maker in makers.items() if maker == name]
            print(f"  runs at most: {', '.join(own) or 'nothing'}")
        return
    seed = int(read_params(root)["project"]["seed"])
    try:
        scores = [run_arm(root, chosen_design, one) for one in arms]
    except AblationFailed as problem:
        raise fail(str(problem), 1) from None
    table = ablation_table(chosen_design, arms, scores, resamples=2000, seed=seed)
    target = root / "runs" / "ablate" / design / "table.md"
    target.write_text(table, encoding="utf-8")
    print(table)
