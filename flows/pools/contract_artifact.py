"""What the data contracts found, on the Prefect page of a run: a line per gate and its pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flows.records.records import Record, RunResult
from flows.tracking.run_pages import record_url

RESULTS, PAGE, ROWS = "results.json", "report.html", "failed_rows.parquet"
_HEAD = """\
| stage | verdict | expectations that hold | critical | warnings | page | violating rows |
|---|---|---|---|---|---|---|"""


def contracts_table(records: Mapping[str, Record], pages: str | None) -> str | None:
    """Markdown: a row per contract that was checked; None where no stage checked one.

    Args:
        records: by stage.
        pages: address of the MLflow UI, which shows page and rows; None: their files are named.
    """
    lines = []
    for stage, record in records.items():
        if (result := record.result) is not None:
            lines += _lines(stage, record, result, pages)
    return "\n".join([_HEAD, *lines]) if lines else None


def _lines(stage: str, record: Record, result: RunResult, pages: str | None) -> list[str]:
    """A stage may check a contract of its own beside other work: its files have a prefix."""
    lines = []
    for results in (Path(path) for path in result.artifacts if path.endswith(RESULTS)):
        prefix = results.name.removesuffix(RESULTS)
        # Other stages have a results.json too.
        if f"{prefix}expectations" not in result.metrics:
            continue
        count = {
            key: int(result.metrics[f"{prefix}{key}"])
            for key in (
                "passed",
                "expectations",
                "skipped",
                "critical_failures",
                "warning_failures",
            )
        }
        critical, warnings = count["critical_failures"], count["warning_failures"]
        verdict = "**stopped**" if critical else "warned" if warnings else "held"
        holds = f"{count['passed']} of {count['expectations']}"
        if count["skipped"]:
            holds += f", {count['skipped']} skipped"
        links = [
            _link(record, results.with_name(f"{prefix}{name}"), pages) for name in (PAGE, ROWS)
        ]
        cells = [stage, verdict, holds, str(critical), str(warnings), *links]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _link(record: Record, file: Path, pages: str | None) -> str:
    address = record_url(record, pages, file.name)
    return f"`{file}`" if address is None else f"[{file.name}]({address})"
