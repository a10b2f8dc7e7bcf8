"""The history of runs as people read it: lines in the terminal, or a page with links."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.padding import Padding
from rich.text import Text

from components.files.page_templates import page_templates
from flows.history.run_history import RunLine
from flows.tracking.run_pages import flow_run_url, shown_run_url

_INDENT = (0, 0, 0, 4)
_STYLES = {"FAILED": "red", "KILLED": "red", "RUNNING": "yellow"}


@dataclass(frozen=True)
class Uis:
    """Addresses of the pages for people; None where no server runs."""

    mlflow: str | None
    prefect: str | None


@dataclass(frozen=True)
class ShownRun:
    """A run with what readers need besides its values."""

    line: RunLine
    started: str
    """Local time to the minute."""
    took: str
    mlflow_url: str | None
    """Its page; None while no server shows it."""
    prefect_url: str | None


def shown_runs(lines: Sequence[RunLine], uis: Uis) -> list[ShownRun]:
    """Times in words, and addresses on the servers that run now.

    Args:
        lines: of `run_history`.
        uis: their addresses.
    """
    prefect = uis.prefect
    shown = []
    for line in lines:
        seconds = 0.0 if line.seconds is None else line.seconds
        shown.append(
            ShownRun(
                line,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(line.started_ms / 1000)),
                f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s",
                shown_run_url(uis.mlflow, line.mlflow_experiment, line.mlflow_run),
                flow_run_url(prefect, line.prefect_run) if prefect and line.prefect_run else None,
            )
        )
    return shown


def history_lines(runs: Sequence[ShownRun]) -> Iterator[Padding | Text]:
    """A few lines a run, for 80 columns; terminals that can open links open the servers' pages."""
    for run in runs:
        line = run.line
        when = f"{line.status.lower():<8}  {run.started}  {run.took:<6}  {line.engine}"
        yield Text(f"{line.record:<22}  {when}".rstrip(), style=_STYLES.get(line.status, ""))
        where = Text(line.commit[:8] + ("+" if line.is_dirty else ""))
        for name, identity, address in (
            ("MLflow", line.mlflow_run[:8], run.mlflow_url),
            ("Prefect", line.prefect_run[:8], run.prefect_url),
            ("experiment", line.experiment, None),
        ):
            if identity:
                where.append(f"  {name} ")
                where.append(identity, style="" if address is None else f"link {address}")
        yield Padding(where, _INDENT, expand=False)
        said = " ".join(filter(None, (line.summary, f"(in {line.tree})" if line.tree else "")))
        if said:
            yield Padding(Text(said), _INDENT, expand=False)


def history_page(project: str, runs: Sequence[ShownRun], total: int, uis: Uis) -> str:
    """A self-contained HTML page.

    Args:
        project: its name.
        runs: to show.
        total: how many there are.
        uis: what the links lead to.
    """
    templates = page_templates(Path(__file__).parents[1] / "templates")
    return templates.get_template("history.html.j2").render(
        project=project, runs=runs, total=total, uis=uis, now=time.strftime("%Y-%m-%d %H:%M")
    )
