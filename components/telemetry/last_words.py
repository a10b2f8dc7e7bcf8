"""Which line of a program's output says how it ended."""

from __future__ import annotations


def last_words(text: str, *beginnings: str) -> str:
    """The last line of an output that is not empty; "no message" where there is none.

    Args:
        text: the output.
        beginnings: how a line begins that says more than those below it ("fatal:"); the last of
            these, where there is one.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(beginnings)] if beginnings else []
    return (telling or lines or ["no message"])[-1]
