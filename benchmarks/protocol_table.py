"""docs/protocols.md, made from the papers' tables and the metric cards.

python benchmarks/protocol_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.metrics.cards import CARDS, card  # noqa: E402
from components.metrics.paper_tables import TABLES  # noqa: E402
from components.metrics.published import PublishedTable  # noqa: E402

PAGE = ROOT / "docs" / "protocols.md"
HEAD = """# Protocols

Made by `python benchmarks/protocol_table.py` from the printed tables and the metric cards; a test
fails when it is out of date. Two numbers compare only where suite and protocol id are equal.
"""
_KNOWN = {c.id for c in CARDS}


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(*heads: str) -> list[str]:
    return [_line(*heads), "|" + "---|" * len(heads)]


def columns() -> list[str]:
    """A row per printed column: script, ours, equal or not and why."""
    lines = _table("table", "column", "script or line", "ours", "protocol id of ours", "equal")
    for table in TABLES:
        for place, field in enumerate(table.fields):
            ours = card(field.measure).protocol if field.measure in _KNOWN else ""
            why = _why(table, place, ours)
            lines.append(
                _line(
                    f"{table.source} (`{table.name}`)",
                    field.head,
                    field.script,
                    f"`{field.measure}`",
                    f"`{ours}`" if ours else "",
                    "yes" if not why else f"no: {why}",
                )
            )
    return lines


def _why(table: PublishedTable, place: int, ours: str) -> str:
    if table.filling == "runtime":
        return "seconds and bytes compare on equal hardware alone"
    if table.filling == "judge":
        return "another judge and other words, unless --model and --prompt-file give theirs"
    return table.comparison(place, ours)


def sampling() -> list[str]:
    """A row per table: the suite that fills it, what the paper states, and how ours is asked."""
    lines = _table("table", "filled by", "printed with", "asked here with")
    for table in TABLES:
        options = [table.options, *(f"{names}: {text}" for names, text in table.options_of)]
        asked = "; ".join(filter(None, options)) or "the systems' own defaults"
        lines.append(_line(f"`{table.name}`", f"{table.filling} {table.suite}", table.wants, asked))
    return lines


def metrics() -> list[str]:
    """A row per metric: what it is after, and what deviates."""
    lines = _table("metric", "protocol id", "after", "deviates", "sees of 4096 x 4096")
    lines += [
        _line(f"`{c.id}`", f"`{c.protocol}`", c.follows, c.deviates or "–", c.sees) for c in CARDS
    ]
    return lines


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## Columns of the papers\n",
        *columns(),
        "\n## Prompts, seeds, steps and guidance\n",
        "A suite's seeds are `image_seed(--seed, place in the list, height, width)`, so that every "
        "system starts from the same noise; no paper states its own. Prompt lists are those of the "
        "benchmark's metadata.jsonl (195 at 4096, 2,781 at 2048), in its order.\n",
        *sampling(),
        "\n## Metrics\n",
        *metrics(),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
