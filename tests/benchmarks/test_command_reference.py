"""Pages that speak of commands, against the commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import command_reference
import pytest
import typer

from flows.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DECISIONS = DOCS / "decisions"
"""Has an index of its own."""
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_page_of_commands_is_what_help_says() -> None:
    assert command_reference.PAGE.read_text(encoding="utf-8") == command_reference.reference(), (
        "docs/commands.md is out of date: python benchmarks/command_reference.py"
    )


def typed_lines(page: Path) -> list[str]:
    """Every `ultraflux ...` of a page, in code spans and blocks."""
    text = page.read_text(encoding="utf-8").replace("\\|", "|").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL))
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.partition("#")[0] for line in blocks.splitlines()] + spans
    return [line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*ultraflux ", line)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    wrong = []
    root: Any = typer.main.get_command(app)
    for line in typed_lines(page):
        words = re.sub(r"^(?:[A-Z_]+=\S+ )*ultraflux ", "", line)
        try:
            parts = shlex.split(words)
        except ValueError:
            parts = words.split()
        command = root
        while parts and hasattr(command, "commands") and parts[0] in command.commands:
            command = command.commands[parts.pop(0)]
        if hasattr(command, "commands") and parts and re.fullmatch(r"[a-z-]+", parts[0]):
            wrong.append(f"{line}: no command {parts[0]}")
            continue
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        given = {part.partition("=")[0] for part in parts if part.startswith("--")}
        unknown = given - known - {"--help", "--version"}
        if unknown:
            wrong.append(f"{line}: no option {', '.join(sorted(unknown))}")
    assert wrong == []


def test_the_first_screen_of_the_readme_is_short_and_shows_a_picture() -> None:
    """At most 130 words before the first heading below the title, and one picture of our own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.split("\n## ")[0]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", first)
    assert len(pictures) == 1
    assert (ROOT / pictures[0]).stat().st_size < 300_000
    words = re.sub(r"!\[[^\]]*\]\([^)]+\)|\]\([^)]+\)|[`#*|\[]", " ", first).split()
    assert len(words) <= 130


def test_the_index_of_docs_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES[1:] if page.parent != DECISIONS]
    pages.remove("README.md")
    assert [name for name in pages if f"]({name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert gone == []
