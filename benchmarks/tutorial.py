"""Run a tutorial as it is printed: every block of commands, in order, in a clone.

python benchmarks/tutorial.py docs/tutorials/evaluating.md /tmp/clone

A block of `bash` is run by bash (`-euo pipefail`). The line before a block may say otherwise, as a
comment of Markdown: `<!-- runs first: ... -->` moves it to the front (what a reader has and a fresh
clone has not), `<!-- not run: why -->` leaves it out. A block of `text` behind a block of commands
is what they print: each line has to stand in their output, `...` for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?:<!-- (?P<how>runs first|not run)[^\n]*-->\n)?```(?P<kind>bash|text)\n(?P<text>.*?)```",
    re.DOTALL,
)


class TutorialFailed(AssertionError):
    """A page says what does not happen."""


@dataclass
class Block:
    """Commands of a page, and what it says that they print."""

    commands: str
    how: str
    """"", "runs first" or "not run"."""
    printed: str = ""


def blocks(page: str) -> list[Block]:
    """Blocks of commands in the order in which they run."""
    found: list[Block] = []
    for match in _BLOCK.finditer(page):
        if match["kind"] == "bash":
            found.append(Block(match["text"], match["how"] or ""))
        elif found:
            found[-1].printed += match["text"]
    return sorted(found, key=lambda block: block.how != "runs first")


def run_block(block: Block, folder: Path, env: Mapping[str, str]) -> str:
    """Run a block; its output, errors included.

    Raises:
        TutorialFailed: a command failed, or a line that the page shows was not printed.
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.commands],
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise TutorialFailed(f"{block.commands}ended with {done.returncode}:\n{done.stdout}")
    # Tables are as wide as the terminal of whoever wrote the page; runs of blanks count once.
    seen = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in filter(None, (" ".join(line.split()) for line in block.printed.splitlines())):
        pattern = ".*".join(re.escape(part) for part in line.split("..."))
        if not any(re.fullmatch(pattern, one) for one in seen):
            raise TutorialFailed(f"{block.commands}does not print\n{line}\nbut\n{done.stdout}")
    return done.stdout


def run_page(page: Path, folder: Path, home: Path, *, echo: bool = False) -> list[str]:
    """Run a page in a clone with a home of its own; outputs of its blocks."""
    env = os.environ | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "COLUMNS": "110",
    }
    outputs = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.how == "not run":
            continue
        if echo:
            print(f"$ {block.commands}", end="", flush=True)
        outputs.append(run_block(block, folder, env))
        if echo:
            print(outputs[-1], flush=True)
    return outputs


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/tutorial.py PAGE CLONE")
    clone = Path(sys.argv[2]).resolve()
    home = clone / "runs" / "tutorial-home"
    home.mkdir(parents=True, exist_ok=True)
    try:
        run_page(Path(sys.argv[1]).resolve(), clone, home, echo=True)
    except TutorialFailed as problem:
        sys.exit(f"error: {problem}")
