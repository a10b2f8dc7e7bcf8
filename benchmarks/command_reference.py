"""docs/commands.md, made from the commands' own help.

python benchmarks/command_reference.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from flows.cli import app  # noqa: E402

PAGE = ROOT / "docs" / "commands.md"
HEAD = """# Commands

Made from `--help` by `python benchmarks/command_reference.py`; a test fails when it is out of date.
`ultraflux` stands for `.venv/bin/ultraflux` (or put `.venv/bin` in your PATH once).
"""


def reference() -> str:
    """The page."""
    root: Any = typer.main.get_command(app)
    commands = list(_commands(root, "ultraflux"))
    lines = [HEAD, "| command | |", "|---|---|"]
    for name, command in commands:
        anchor = name.replace(" ", "-")
        lines.append(f"| [`{name}`](#{anchor}) | {_plain(_first(command.help))} |")
    for name, command in commands:
        lines += ["", f"## {name}", "", _plain(command.help or ""), ""]
        lines += _parameters(command)
        if command.epilog:
            # As written: blank lines part the examples.
            lines += ["```", _plain(command.epilog, keep_lines=True), "```"]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _parameters(command: Any) -> list[str]:
    rows = []
    for one in command.params:
        if getattr(one, "hidden", False) or one.name == "help":
            continue
        is_option = one.param_type_name == "option"
        names = ", ".join([*one.opts, *one.secondary_opts]) if is_option else one.name.upper()
        text = _plain(getattr(one, "help", "") or "").replace("|", "\\|")
        rows.append(f"| `{names}` | {text} |")
    return ["| | |", "|---|---|", *rows, ""] if rows else []


def _first(text: str | None) -> str:
    return (text or "").partition("\n\n")[0].replace("|", "\\|")


def _plain(text: str, *, keep_lines: bool = False) -> str:
    """Without the terminal's marks."""
    text = re.sub(r"\[/?(?:bold|dim|italic)?\]", "", text)
    if keep_lines:
        return text.strip()
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).strip()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
