"""What is checked of a system's pictures before they are measured: size, and how they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.evaluation.measuring.evaluation_run import Found
from components.evaluation.suites.suites import SuiteItem

_NAMED = 2


def _size(width: int, height: int) -> str:
    return f"{width}x{height}"


def measured_sizes(found: Sequence[Found]) -> dict[str, int]:
    """Pictures of each size, "width x height"; unreadable ones are left out."""
    counts = Counter(_size(one.width, one.height) for one in found if one.error is None)
    return dict(sorted(counts.items()))


def other_size(items: Sequence[SuiteItem], found: Sequence[Found]) -> str:
    """Which pictures have another size than was asked for, in one line; empty: none.

    Args:
        items: of the suite.
        found: the picture of each.
    """
    wrong = [
        (item, one)
        for item, one in zip(items, found, strict=True)
        if one.error is None and (one.height, one.width) != (item.height, item.width)
    ]
    if not wrong:
        return ""
    changes = Counter(
        (_size(one.width, one.height), _size(item.width, item.height)) for item, one in wrong
    )
    named = [f"{size} instead of {asked}" for (size, asked), _ in changes.most_common(_NAMED)]
    more = f" and {len(changes) - _NAMED} other sizes" if len(changes) > _NAMED else ""
    return (
        f"{len(wrong)} of {len(items)} pictures are {', '.join(named)}{more} (width x height), "
        f"such as {wrong[0][1].path.name}"
    )


def left_out(by_name: Mapping[str, Path], items: Sequence[SuiteItem]) -> list[str]:
    """A line about files whose names are no item's, where every item has its own."""
    extra = sorted(by_name.keys() - {item.id for item in items})
    if not extra:
        return []
    return [
        f"{len(extra)} of {len(by_name)} pictures have no item's name and were left out, such as "
        f"{by_name[extra[0]].name}"
    ]


def reading_notes(found: Sequence[Found]) -> list[str]:
    """A line about pictures that are not plain 8-bit sRGB; metrics see what a viewer shows."""
    special = [one for one in found if one.error is None and one.reading]
    if not special:
        return []
    kinds = ", ".join(dict.fromkeys(one.kind for one in special))
    return [
        f"{len(special)} of {len(found)} pictures are not plain 8-bit sRGB ({kinds}), such as "
        f"{special[0].path.name}; they were read as a viewer shows them: upright, in sRGB, "
        "transparency over white, 16 bits scaled to 8"
    ]
