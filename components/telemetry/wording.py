"""How people read numbers, names and lists in one line: hours, ages, bytes, long lists."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_HARMLESS = "\t\u200c\u200d"
"""Besides the tab the joiners: part of the spelling of Persian, of Indian languages, of emoji."""


def legible(line: str) -> str:
    r"""What others wrote, such as a name, for a terminal: "\x1b" and "\n" for what does not show.

    Escape sequences, line breaks and marks that turn text around would change other words.
    """
    if line.isprintable():
        return line
    return "".join(char if _shows(char) else ascii(char)[1:-1] for char in line)


def _shows(char: str) -> bool:
    # Spaces of other scripts are white and no more.
    return char.isprintable() or char in _HARMLESS or unicodedata.category(char) == "Zs"


def legible_lines(text: str) -> str:
    """The same for text that may be of several lines."""
    return "\n".join(legible(line) for line in text.splitlines())


def few(names: Sequence[str], shown: int, between: str = ", ") -> str:
    """The first names, and how many more there are: "a, b and 3 more"; "" of none."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return between.join(map(legible, names[:shown])) + more


def time_text(hours: float) -> str:
    """Such as "42 s", "3.5 min" or "12.0 h"."""
    seconds = hours * 3600
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def age_text(seconds: float) -> str:
    """In the largest whole unit: "40 s", "3 min", "5 h" or "12 d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def flops_text(flops: float) -> str:
    """Operations with a unit, three digits: "418 TFLOP"."""
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= 0.9995 * size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit, as disks and data sheets state them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
