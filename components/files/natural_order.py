"""The order in which people number files: 2 before 10."""

from __future__ import annotations

import re

_NUMBERS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[str, int, str], ...]:
    """Sort key of a name: runs of digits by their value, everything else as text.

    Equal values with other zeros in front (1 and 01) keep the order of their texts.
    """
    parts = _NUMBERS.split(name)
    return tuple(
        ("", int(part), part) if place % 2 else (part, 0, "") for place, part in enumerate(parts)
    )
