"""`ultraflux report`: the page about an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from components.files.whole_files import write_text
from flows.commands.command_line import fail, refusing, workplace

EPILOG = """Examples:

  ultraflux report runs/evaluations/aesthetic-eval-4096

  ultraflux report runs/evaluations/detail --baseline flux --decision data/promote/decision.json

  ultraflux report runs/evaluations/new --with runs/evaluations/old --judged judged

  ultraflux report runs/evaluations/aspect-ratio --tiles --out /tmp/aspect.html"""


def report(
    evaluation: Annotated[Path, typer.Argument(help="Folder that `ultraflux evaluate` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in that folder.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="System that others are compared with; default: the first.")
    ] = None,
    decision: Annotated[
        Path | None, typer.Option(help="A gate's decision.json, shown in the page.")
    ] = None,
    budget_mb: Annotated[
        float, typer.Option(min=5, help="Largest page in MB; worst cases fill what is left.")
    ] = 60,
    tiles: Annotated[
        bool,
        typer.Option("--tiles", help="Native pixels of all pictures, in a folder beside the page."),
    ] = False,
    further: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="Folder of another evaluation of the suite, whose systems are compared too; "
            "repeatable. Refused where suite, protocols or weights differ.",
        ),
    ] = None,
    judged: Annotated[
        list[Path] | None, typer.Option(help="Folder of `ultraflux judge`, shown in the page.")
    ] = None,
    runtime: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the runtime suite, shown in the page."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Also every number with its interval, as CSV.")
    ] = None,
    latex: Annotated[Path | None, typer.Option(help="Also the tables, as LaTeX.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 2,
) -> None:
    """Write one HTML file: tables, statistics, worst cases, and a native-pixel viewer.

    No network is needed to look at it. Thumbnails of all pictures and a crop of native pixels each
    are inside, and the whole native pixels of the worst cases as far as the budget goes.
    """
    if not evaluation.is_dir():
        raise fail(f"{evaluation}: no such folder; make one with ultraflux evaluate SUITE")
    from components.evaluation.pages.suite_report import ReportOptions, build_suite_report
    from flows.versioning.profiles import settings_of

    root = workplace()
    target = out or evaluation / "report.html"
    with refusing(ValueError):
        settings = settings_of(root)
        if target.is_dir():
            raise ValueError(f"--out {target}: a folder; name the page, such as report.html")
        made = build_suite_report(
            evaluation,
            root,
            ReportOptions(
                baseline=baseline,
                budget_bytes=int(budget_mb * 1e6),
                tiles=target.with_name(f"{target.stem}-tiles") if tiles else None,
                workers=workers,
                resamples=settings.evaluate.bootstrap_resamples,
                seed=settings.project.seed,
                further=tuple(further or ()),
                judged=tuple(judged or ()),
                timed=tuple(runtime or ()),
            ),
            None if decision is None else _decision(decision),
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The default is part of an evaluation, which in a clone may lead into DVC's cache.
    write_text(target, made.html, follow=out is not None)
    _export((evaluation, *(further or ())), csv, latex)
    for line in made.verdicts:
        print(line)
    held = made.held
    print(
        f"{held.thumbnails} pictures, {held.crops} native crops, {held.whole} whole at native "
        f"pixels; {target.stat().st_size / 1e6:.1f} MB"
    )
    print(f"Report: {target}")


def _export(evaluations: Sequence[Path], csv: Path | None, latex: Path | None) -> None:
    from components.evaluation.pages.merged_evaluation import read_together
    from components.evaluation.pages.suite_tables import metric_tables
    from components.evaluation.pages.table_export import as_csv, as_latex

    read = read_together(evaluations)
    for path, make in (
        (csv, lambda: as_csv(read)),
        (latex, lambda: as_latex(metric_tables(read))),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, make(), follow=True)
            print(f"Table: {path}")


def _decision(path: Path) -> dict[str, Any]:
    needed = {"promoted", "alias", "rules", "not_compared", "digests"}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"--decision {path}: not readable ({problem})") from None
    if not isinstance(found, dict) or not needed <= found.keys():
        raise ValueError(f"--decision {path}: not a gate's decision; see data/promote/")
    return found
