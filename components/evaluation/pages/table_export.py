"""An evaluation's numbers as CSV for programs and as LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from components.evaluation.pages.evaluation_files import Evaluation
from components.evaluation.pages.report_page import Table
from components.metrics.cards import card

_ARROWS = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "–": "--",
    "†": r"$^{\dagger}$",
}
_ESCAPED = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def as_csv(evaluation: Evaluation) -> str:
    """A row per system, stratum and metric: value, ends of the 95% interval, and counts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    counts = ("low", "high", "n", "prompts", "infinite")
    writer.writerow(("suite", "system", "stratum", "metric", "protocol", "value", *counts))
    strata = ["", *sorted(set(evaluation.table["stratum"]))]
    for system in evaluation.systems:
        for stratum in strata:
            prefix = f"{system}.{stratum}" if stratum else system
            for metric in evaluation.measured:
                name = f"{prefix}.{metric}"
                values = [evaluation.metrics.get(f"{name}_{end}") for end in counts]
                value = evaluation.metrics.get(name)
                if value is None and not evaluation.metrics.get(f"{name}_infinite"):
                    continue
                shown = ["" if one is None else repr(one) for one in (value, *values)]
                protocol = card(metric).protocol
                writer.writerow((evaluation.suite, system, stratum, metric, protocol, *shown))
    return out.getvalue()


def _text(value: str) -> str:
    return "".join(_ARROWS.get(c, _ESCAPED.get(c, c)) for c in value)


def as_latex(tables: Sequence[Table]) -> str:
    """The page's tables as booktabs tables, best values bold, intervals beneath in small type.

    Below each stands where printed rows are from, and which numbers do not compare with them.
    """
    blocks = []
    for table in tables:
        head = " & ".join(_text(name) for name in (table.first, *table.columns))
        lines = [
            r"\begin{tabular}{l" + "r" * len(table.columns) + "}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
        ]
        for row in (*table.rows, *table.strata):
            if row.first_ours and table.source:
                lines.append(r"\midrule")
            cells = [_text(row.name + (" (published)" if row.published else ""))]
            for cell in row.cells:
                text = _text(cell.text)
                text = rf"\textbf{{{text}}}" if cell.best else text
                cells.append(
                    text + (rf" {{\tiny {_text(cell.interval)}}}" if cell.interval else "")
                )
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        if table.source:
            lines.append(rf"\par\smallskip{{\footnotesize {_text(table.source)}\par}}")
        blocks.append(f"% {table.caption}\n" + "\n".join(lines) + "\n")
    return "\n".join(blocks)
