"""Several evaluations of one suite as one, so that systems of two folders are compared.

What must agree is what the folders' locks name: suite, items, and the protocol and weights of every
metric that both have. How systems sampled may differ: that is what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from components.evaluation.measuring.evaluation_lock import read_lock
from components.evaluation.pages.evaluation_files import (
    Evaluation,
    EvaluationIncomplete,
    read_evaluation,
)
from components.evaluation.suites.suite_scores import clashing_name


def read_together(folders: Sequence[Path]) -> Evaluation:
    """One evaluation of all systems; one whose name two folders have is called NAME@FOLDER.

    Args:
        folders: of `ultraflux evaluate`, at least one; the first names the suite.

    Raises:
        EvaluationIncomplete: a folder that is none, or one that does not compare with the first.
    """
    first, *others = (read_evaluation(folder) for folder in folders)
    if not others:
        return first
    notes = list(first.notes)
    for folder, other in zip(folders[1:], others, strict=True):
        notes += _compared(folders[0], first, folder, other)
    every = (first, *others)
    names = [name for one in every for name in one.systems]
    labels = _labels(folders)
    parts = [
        _renamed(one, {name: f"{name}@{label}" for name in one.systems if names.count(name) > 1})
        for one, label in zip(every, labels, strict=True)
    ]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    named = [name for part in parts for name in part.systems]
    if clash := clashing_name(named, set(table["stratum"])):
        raise EvaluationIncomplete(f"{clash}; evaluate it under another name")
    if any(part.set_comparisons for part in parts):
        notes.append("exchange tests of sets are of one folder each")
    return replace(
        parts[0],
        metrics={name: value for part in parts for name, value in part.metrics.items()},
        unavailable={
            name: reason
            for part in parts
            for name, reason in part.unavailable.items()
            if not any(name in other.measured for other in parts)
        },
        failed_systems={k: v for part in parts for k, v in part.failed_systems.items()},
        table=table,
        scores_sha256=" + ".join(part.scores_sha256 for part in parts),
        pictures=[picture for part in parts for picture in part.pictures],
        set_comparisons=tuple(one for part in parts for one in part.set_comparisons),
        sizes={name: sizes for part in parts for name, sizes in part.sizes.items()},
        other_sizes={name: size for part in parts for name, size in part.other_sizes.items()},
        notes=tuple(dict.fromkeys((*notes, *(n for part in parts[1:] for n in part.notes)))),
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return [
        f"{name}-{place}" if names.count(name) > 1 else name
        for place, name in enumerate(names, start=1)
    ]


def _compared(folder: Path, first: Evaluation, other_folder: Path, other: Evaluation) -> list[str]:
    """What a reader must know of the pair.

    Raises:
        EvaluationIncomplete: they do not compare.
    """
    found: list[str] = []
    ours, theirs = read_lock(folder), read_lock(other_folder)
    if ours is not None and theirs is not None:
        found = theirs.differences(ours, sampling=False, code=False)
    # A lock names the suite that was asked for, of which a decision may have needed a part.
    if not found and (first.suite, first.protocol) != (other.suite, other.protocol):
        found = [f"suite {other.suite} ({other.protocol}), was {first.suite} ({first.protocol})"]
    protocols = [
        dict(zip(one.table["metric"], one.table["protocol"], strict=True)) for one in (first, other)
    ]
    found += [
        f"protocol of {name} {protocols[1][name]}, was {protocols[0][name]}"
        for name in sorted(set(protocols[0]) & set(protocols[1]))
        if protocols[0][name] != protocols[1][name]
    ]
    if not {p["item"] for p in first.pictures} & {p["item"] for p in other.pictures}:
        found.append("no item in common")
    if found:
        raise EvaluationIncomplete(
            f"{other_folder}: does not compare with {folder}: {'; '.join(dict.fromkeys(found))}"
        )
    if ours is None or theirs is None:
        return [f"{other_folder.name}: without a lock, so weights and code were not compared"]
    if ours.code != theirs.code:
        return [f"{other_folder.name}: measured by other code under the same protocols"]
    return []


def _renamed(part: Evaluation, names: dict[str, str]) -> Evaluation:
    if not names:
        return part

    def prefix(key: str) -> str:
        # Of all systems the longest name that fits: one system's may begin another's.
        fitting = [name for name in part.systems if key.startswith(f"{name}.")]
        old = max(fitting, key=len, default="")
        return names.get(old, old) + key[len(old) :]

    def keys(values: dict[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in values.items()}

    return replace(
        part,
        metrics={prefix(name): value for name, value in part.metrics.items()},
        failed_systems=keys(part.failed_systems),
        table=part.table.assign(system=part.table["system"].replace(names)),
        pictures=[
            picture | {"system": names.get(picture["system"], picture["system"])}
            for picture in part.pictures
        ],
        set_comparisons=tuple(
            replace(
                one,
                system=names.get(one.system, one.system),
                baseline=names.get(one.baseline, one.baseline),
            )
            for one in part.set_comparisons
        ),
        sizes=keys(part.sizes),
        other_sizes=keys(part.other_sizes),
    )
