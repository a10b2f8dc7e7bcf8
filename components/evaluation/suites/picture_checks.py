"""What is checked of a system's pictures before they are measured: size, and how they read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from components.evaluation.measuring.evaluation_run import Found
from components.evaluation.suites.suites import SuiteItem

_NAMED = 2
_FLOAT = "F"
"""PIL's mode of floating-point pictures, as `Found.kind` says it."""
FLOAT_RANGE = (
    "; floating-point values by 1, or where they exceed it by the largest of the file, so that two "
    "such files may be scaled differently: save them as 16 bits to compare them"
)


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


def left_out(by_name: Mapping[str, Path], ids: Set[str]) -> list[str]:
    """A line about files whose names are no item's, where every item has its own."""
    extra = sorted(by_name.keys() - ids)
    if not extra:
        return []
    return [
        f"{len(extra)} of {len(by_name)} pictures have no item's name and were left out, such as "
        f"{by_name[extra[0]].name}"
    ]


def missing_values(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about pictures that a mean does not hold: not measured, or without a defined value.

    Args:
        rows: of one system, as the table of scores has them.
    """
    total = len({row["item"] for row in rows})
    failed: dict[str, set[str]] = defaultdict(set)
    undefined: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["error"] is not None:
            failed[row["item"]].add(row["error"])
        elif row["value"] is None or math.isnan(row["value"]):
            undefined[row["metric"]].append(f"{row['image']} ({row['width']}x{row['height']})")
    lines = []
    if failed:
        reasons = Counter(error for errors in failed.values() for error in errors)
        reason, _ = reasons.most_common(1)[0]
        more = f", and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
        lines.append(
            f"{len(failed)} of {total} pictures could not be measured and are in no mean: "
            f"{reason}{more}"
        )
    same: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for metric, images in undefined.items():
        same[tuple(images)].append(metric)
    for alike, metrics in same.items():
        what = "has" if len(metrics) == 1 else "have"
        lines.append(
            f"{', '.join(metrics)} {what} no value for {len(alike)} of {total} pictures, too "
            f"small or without what it measures, such as {alike[0]}"
        )
    return lines


def reading_notes(found: Sequence[Found]) -> list[str]:
    """A line about pictures that are not one plain 8-bit sRGB; metrics see what a viewer shows."""
    special = [one for one in found if one.error is None and one.kind]
    if not special:
        return []
    kinds = ", ".join(dict.fromkeys(one.kind for one in special))
    return [
        f"{len(special)} of {len(found)} pictures are not plain 8-bit sRGB ({kinds}), such as "
        f"{special[0].path.name}; they were read as a viewer shows them: upright, in sRGB, "
        "transparency over white, 16 bits scaled to 8"
        + (FLOAT_RANGE if any(f" {_FLOAT} " in f" {one.kind} " for one in special) else "")
    ]
