"""Progress of long work: a bar on a terminal, and a small JSON file for a supervising process.

A stage usually runs as a child of a scheduler that owns the terminal. Where the environment
variable `ULTRAFLUX_PROGRESS_FILE` names a file, the current position is written there (atomically,
at most twice a second) and no bar is drawn. Without a terminal a line is printed now and then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from components.files.whole_files import write_text

T = TypeVar("T")

PROGRESS_FILE = "ULTRAFLUX_PROGRESS_FILE"
_WRITE_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0
"""Between lines where stderr is not a terminal."""


def _write(path: Path, description: str, done: int, total: int | None) -> None:
    write_text(
        path, json.dumps({"description": description, "done": done, "total": total}), contended=True
    )


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    initial: int = 0,
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yield `items`, showing how many are done.

    Args:
        items: what is iterated.
        description: short name, such as "dit_stage1".
        total: number of items including `initial`; taken from `len(items)` when possible.
        initial: items already done before (resumed work).
        note: says more about the work so far, such as "3.2 MB/s".
    """
    if total is None and isinstance(items, Sized):
        total = initial + len(items)
    target = os.environ.get(PROGRESS_FILE)
    if target is None and not sys.stderr.isatty():
        yield from _lines(items, description, total, initial, note)
        return
    if target is None:
        bar = tqdm(items, description, total=total, initial=initial)
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)
        return
    path = Path(target)
    last = 0.0
    done = initial
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _WRITE_INTERVAL_S or done == total:
            last = now
            text = f"{description} ({note()})" if note is not None else description
            _write(path, text, done, total)


def _lines(
    items: Iterable[T],
    description: str,
    total: int | None,
    initial: int,
    note: Callable[[], str] | None,
) -> Iterator[T]:
    """Yield `items`; a line on stderr every `LINE_INTERVAL_S`, none for short work."""
    began = last = time.monotonic()
    for done, item in enumerate(items, initial + 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_INTERVAL_S:
            last = now
            passed = tqdm.format_interval(now - began)
            line = f"{description}: {done}"
            if total is not None:
                left = (now - began) / (done - initial) * (total - done)
                line += f" of {total}, {passed} passed, {tqdm.format_interval(left)} to go"
            else:
                line += f", {passed} passed"
            print(f"{line}, {note()}" if note is not None else line, file=sys.stderr)
