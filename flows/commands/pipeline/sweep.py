"""The command `ultraflux sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, project_root, refuse_unknown_stage, refusing
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.evaluation.suites.ablation import Arm
    from flows.experiments.sweep import Order, SetResult

EPILOG = """Examples:

  ultraflux sweep -S dit_stage1.learning_rate=1e-4,3e-4 -S objective.kind=flow_matching,snr_huber

  ultraflux sweep -S select.min_entropy_bits=6.8,7.0,7.2 --until slices --parallel 2

  ultraflux sweep -S vae.steps=200,400 --dry-run

Every combination is a pipeline run of the committed code in runs/sweep; stages that sets share are
computed once. The same command goes on with a sweep that was interrupted. Several sets at once need
as many GPUs and as much memory as they need together."""
_SHOWN = 5


def sweep(
    assignments: Annotated[
        list[str],
        typer.Option("-S", "--set", help="section.key=value,value; give it once per key."),
    ],
    parallel: Annotated[int, typer.Option(min=1, help="Sets that run at the same time.")] = 1,
    until: Annotated[str | None, typer.Option(help="Last stage to run (default: all).")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="stage.metric to sort by (default: the last that differs)."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="lowest or highest first, where no card says it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sets and their own stages, run nothing.")
    ] = False,
) -> None:
    """Run the pipeline over every combination of settings and rank them by a metric."""
    if order not in {None, "lowest", "highest"}:
        raise fail(f"--order {order}: choose lowest or highest")
    root = project_root()
    refuse_unknown_stage(root, until)
    from flows.experiments.sweep_sets import SweepRefused, expand, sweep_name
    from flows.versioning.setting_overrides import read_params

    with refusing(SweepRefused):
        sets = expand(assignments, read_params(root))
    from flows.experiments import sweep as sweeps
    from flows.running.working_trees import TreeRefused
    from flows.versioning.code_files import CODE
    from flows.versioning.graph import stages_until

    # `code` measures nothing.
    ran = [name for name in stages_until(root, until) if name != CODE]
    if metric is not None and (metric.partition(".")[0] not in ran or "." not in metric):
        raise fail(f"--metric {metric}: expected stage.metric of {', '.join(ran)}")
    try:
        if dry_run:
            _show_plan(root, sets, until)
            return
        name = sweep_name(sets)
        record, results = sweeps.run_sweep(root, name, sets, parallel=parallel, until=until)
    except TreeRefused as problem:
        raise fail(str(problem)) from None
    except KeyboardInterrupt:
        raise fail("interrupted; nothing computed is lost, run it again to go on", 130) from None
    differing = sweeps.differing_metrics(results)
    measured = sorted({name for one in results for name in one.metrics})
    is_known = metric is None or metric in measured
    chosen = metric if metric in measured else (differing[0] if differing else None)
    end: Order = sweeps.better(chosen or "") or "lowest"
    if order is not None:
        end = "highest" if order == "highest" else "lowest"
    results = sweeps.ranked(results, chosen, end)
    file = sweeps.finish(root, name, record, results, chosen)
    _show(results, [m for m in dict.fromkeys([chosen, *differing]) if m][:_SHOWN], end)
    print(f"All metrics: {file}   Trees: {file.parent}")
    if any(one.problem for one in results):
        raise fail("not every set finished; run the same command to go on", 1)
    if not is_known:
        raise fail(f"--metric {metric}: no set has it; there are {', '.join(measured)}", 1)


def _show_plan(root: Path, sets: Sequence[Arm], until: str | None) -> None:
    from flows.experiments.ablation_runs import plan

    planned = plan(root, sets, until)
    for one in sets:
        own = [stage for stage, maker in planned[one.name].items() if maker == one.name]
        print(f"{one.name}  {one.label}\n  runs at most: {', '.join(own) or 'nothing'}")


def _show(results: Sequence[SetResult], metrics: list[str], end: Order) -> None:
    keys = list(results[0].settings)
    rows = []
    for one in results:
        numbers = [f"{one.metrics[m]:.6g}" if m in one.metrics else "-" for m in metrics]
        if one.problem and numbers:
            numbers[0] = "not finished"
        rows.append((*(str(one.settings[key]) for key in keys), *numbers))
    table = table_of((*keys, *metrics), rows)
    table.caption = f"sorted by {metrics[0]}, {end} first" if metrics else "no metric differs"
    terminal(highlight=False).print(table)
