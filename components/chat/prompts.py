"""A prompt with its version, read from a file, and a model's answer as plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """A prompt and the name under which the manifest records it."""

    version: str
    text: str
    system: str = ""
    """Sent as the system message; empty: none is sent."""


_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course)[,.!]?\s+)?"
    r"(?:here(?: is|'s|’s)\b[^:\n]{0,80}:|caption:|translation:"
    r"|以下是[^：:\n]{0,20}[：:]|译文[：:])\s*",
    re.IGNORECASE,
)


# What models with a visible chain of thought put before their answer; one that ran out of tokens
# never closes it, and then there is no answer.
_THOUGHTS = re.compile(r"^\s*<think>.*?(?:</think>|$)", re.DOTALL)


_QUOTES = {'"': '"', "“": "”", "「": "」", "'": "'"}


def load_prompt(version: str, file: Path | None, built_in: Mapping[str, str]) -> Prompt:
    """The text of `file` when given, else the built-in prompt of that version.

    Raises:
        ValueError: unknown version; missing, empty or non-UTF-8 file.
    """
    if file is None:
        if version not in built_in:
            raise ValueError(
                f"prompt_version {version!r} is not built in (there is {', '.join(built_in)}); "
                "name a prompt_file for a prompt of yours"
            )
        return Prompt(version, built_in[version])
    try:
        text = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ValueError(f"prompt_file: {file.name}: no such file in conf/prompts") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"prompt_file: {file.name}: not UTF-8 at byte {problem.start}") from None
    if not text:
        raise ValueError(f"prompt_file: {file.name} is empty")
    return Prompt(version, text)


def clean_answer(text: str) -> str:
    """One line of plain text.

    Thoughts, a preamble ("Here is a caption:"), outer quotes and line breaks are left out.
    """
    text = _PREAMBLE.sub("", " ".join(_THOUGHTS.sub("", text).split())).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        # A quotation at either end of a caption is part of it.
        if text[0] not in inner and text[-1] not in inner:
            text = inner.strip()
    return text
