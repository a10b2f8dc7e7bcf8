"""What `ultraflux plan --cards` prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.command_line import print_json
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.settings.schema import Settings


def show_cards(settings: Settings, root: Path, *, as_json: bool) -> None:
    """Print a table (or JSON) of cards, edges and the settings that fit.

    Args:
        settings: networks and the stage that trains an adapter.
        root: where relative weight folders start.
        as_json: a list of rows in place of tables.

    Raises:
        ValueError: the settings train all weights.
    """
    from components.planning.cards import card_rows
    from components.planning.memory import GIB
    from components.planning.model_shapes import networks
    from components.planning.transformer import Transformer

    rows = list(card_rows(Transformer(networks(settings, root), settings)))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    console = terminal(soft_wrap=True)
    for work in ("training", "sampling"):
        what = "training, batch 1" if work == "training" else work
        cells = (
            (
                str(row.edge_px),
                f"{row.card_gb} GB",
                row.verdict,
                f"{row.needed_bytes / GIB:.1f} GiB",
                "\n".join(f"{key}: {_text(value)}" for key, value in row.changes.items())
                or "as they are",
                row.error,
            )
            for row in rows
            if row.work == work
        )
        table = table_of(
            ("px", "card", "", "needs", "settings", "error"),
            cells,
            title=f"One GPU: {what} (planned; not measured)",
            left=range(2, 6),
            # A setting that is cut off cannot be typed.
            folded=range(6),
        )
        console.print(table)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(value) + "]"
    return str(value).lower()
