"""Prompts from a file: one a line (.txt), objects (.jsonl) or a table (.csv)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.corpus.written_tables import written_columns, written_rows


@dataclass(frozen=True)
class PromptLine:
    """One line; what it leaves out comes from the command line."""

    prompt: str
    size: str | None = None
    """WIDTHxHEIGHT."""
    seed: int | None = None
    where: str = field(default="", compare=False)
    """Such as "prompts.jsonl line 2"; empty where it was typed."""


SEEDS = 2**63
"""They are below this: what a signed number of 64 bits holds."""
# What stands for bytes that are not UTF-8, and half a pair in JSON: no text can hold it.
_NO_CHARACTER = re.compile("[\ud800-\udfff]")
_FIELDS = ("prompt", "size", "seed")


def odd_character(prompt: str) -> int | None:
    """Number, from 1, of the first character that UTF-8 does not have; None: all are text."""
    found = _NO_CHARACTER.search(prompt)
    return None if found is None else found.start() + 1


def read_prompts(path: Path) -> list[PromptLine]:
    """Prompts of a file, in order.

    Args:
        path: `.txt`: a prompt a line; `.jsonl`: objects with `prompt` and optionally `size`
            (WIDTHxHEIGHT) and `seed`; `.csv`: the same as columns. Empty lines are skipped, other
            fields are ignored.

    Raises:
        ValueError: missing or unreadable file, or a line, by number, without a prompt or with
            another kind of value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file of prompts") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not UTF-8 at byte {problem.start}") from None
    readers = {".txt": _text_lines, ".jsonl": json_objects, ".csv": _csv_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    prompts = [_parse(record, where) for where, record in reader(text, path.name)]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def _text_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{name} line {number}", {"prompt": line}


def json_objects(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("`name` line N", object) of each line of JSON lines that is not blank.

    Raises:
        ValueError: a line, by number, that is no object.
    """
    # Only "\n" ends a line: splitlines() would also split at separators inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{name} line {number}: not JSON: {problem.msg}") from None
        except RecursionError:
            raise ValueError(f"{name} line {number}: too deeply nested") from None
        except ValueError:
            # The other error of the reader: Python converts no number of so many digits.
            raise ValueError(f"{name} line {number}: a number with too many digits") from None
        if not isinstance(record, dict):
            raise ValueError(f"{name} line {number}: expected an object")
        yield f"{name} line {number}", record


def _csv_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if "prompt" not in written_columns(text):
        raise ValueError(f"{name}: has no column named prompt")
    for where, cells in written_rows(text, name, _FIELDS):
        yield where, {column: cell or None for column, cell in cells.items()}


def _parse(record: Mapping[str, Any], where: str) -> PromptLine:
    prompt, size, seed = (record.get(field) for field in _FIELDS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no prompt (a text under the key `prompt`)")
    if (odd := odd_character(prompt)) is not None:
        raise ValueError(f"{where}: prompt: not UTF-8 at character {odd}")
    if size is not None and not isinstance(size, str):
        raise ValueError(f"{where}: size must be WIDTHxHEIGHT, got {size!r}")
    if isinstance(seed, str):
        try:
            seed = int(seed)
        except ValueError:
            raise ValueError(f"{where}: seed must be a whole number, got {seed!r}") from None
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < SEEDS
    if seed is not None and not is_seed:
        raise ValueError(f"{where}: seed must be a whole number from 0, got {seed!r}")
    return PromptLine(prompt.strip(), size, seed, where)
