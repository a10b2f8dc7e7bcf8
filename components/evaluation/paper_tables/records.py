"""Numbers that were measured here, in one shape: of evaluations, times, judgements and ablations.

Whatever a folder holds is read as numbers by (system, group, measure), with what is known of how
they came about. Folders are given, or are those that the commands write by default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.evaluation.measuring.evaluation_lock import read_lock
from components.evaluation.pages.evaluation_files import Evaluation, read_evaluation
from components.evaluation.suites.ablation import DESIGNS
from components.metrics.cards import CARDS, card
from components.metrics.published import PublishedTable

EVALUATIONS = Path("runs/evaluations")
ABLATIONS = Path("runs/ablate")
JUDGED = Path("judged")
_ARM = Path("runs/ablation")
"""Below an arm's tree: the evaluation of its model."""


@dataclass(frozen=True)
class Number:
    """One value, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Pictures, pairs or repeats that it is of."""
    infinite: int = 0
    """Further pictures whose value is infinite (identical ones)."""


@dataclass(frozen=True)
class Record:
    """What one folder holds."""

    folder: Path
    about: str
    """Suite, or what stands for it, as tables name it in `PublishedTable.suite`."""
    numbers: dict[tuple[str, str, str], Number]
    """By system, group ("" for all pictures) and measure."""
    protocols: dict[str, str] = field(default_factory=dict)
    """By measure: the protocol id that it was measured under."""
    missing: dict[str, str] = field(default_factory=dict)
    """By measure: why there is no number, with the command that helps."""
    asked: dict[str, Any] = field(default_factory=dict)
    """How systems sampled, as far as it is known."""
    notes: tuple[str, ...] = ()
    suite: str = ""
    """Of an evaluation: what it was measured on, also where `about` is a design."""
    protocol: str = ""
    """Of that suite."""
    other_sizes: dict[str, str] = field(default_factory=dict)
    """Systems that were not measured at the suite's sizes, and how."""

    @property
    def systems(self) -> tuple[str, ...]:
        """Names in the order of the record."""
        return tuple(dict.fromkeys(system for system, _, _ in self.numbers))


def _from_evaluation(folder: Path, about: str = "", rename: str = "") -> Record:
    """An evaluation's numbers; `rename`: what its one system is called instead."""
    found = read_evaluation(folder)
    if rename and len(found.systems) > 1:
        several = ", ".join(found.systems)
        raise ValueError(f"{folder}: several systems ({several}); the evaluation of an arm has one")
    lock = read_lock(folder)
    protocols = {c.id: c.protocol for c in CARDS}
    if lock is not None:
        protocols |= {name: entry["protocol"] for name, entry in lock.metrics.items()}
    notes = [f"{found.protocol}"] if "+" in found.protocol else []
    notes += [f"{name}: {sizes}" for name, sizes in found.other_sizes.items()]
    return Record(
        folder,
        about or found.suite,
        {
            (rename or system, stratum, measure): number
            for system, stratum, measure, number in _evaluated(found)
        },
        protocols,
        {name: f"{card(name).name}: {reason}" for name, reason in found.unavailable.items()},
        {} if lock is None else lock.asked,
        tuple(notes),
        found.suite,
        found.protocol,
        found.other_sizes if not rename else {rename: "; ".join(found.other_sizes.values())},
    )


def _evaluated(found: Evaluation) -> Iterator[tuple[str, str, str, Number]]:
    strata = ["", *sorted(set(found.table["stratum"]))]
    for system in found.systems:
        for stratum in strata:
            # With one group alone its numbers are those of all pictures.
            prefix = f"{system}.{stratum}" if stratum and len(strata) > 2 else system
            for measure in found.measured:
                name = f"{prefix}.{measure}"
                infinite = int(found.metrics.get(f"{name}_infinite", 0))
                if name not in found.metrics and not infinite:
                    continue
                count = found.metrics.get(f"{name}_n")
                yield (
                    system,
                    stratum,
                    measure,
                    Number(
                        found.metrics.get(name, float("inf")),
                        found.metrics.get(f"{name}_low"),
                        found.metrics.get(f"{name}_high"),
                        None if count is None else int(count),
                        infinite,
                    ),
                )


def _from_runtime(folder: Path) -> Record:
    written = json.loads((folder / "runtime.json").read_text(encoding="utf-8"))
    numbers: dict[tuple[str, str, str], Number] = {}
    for timing in written["timings"]:
        prefix = f"{timing['system']}.{timing['size']}."
        seconds = timing["seconds"]
        ours = {
            name.removeprefix(prefix): value
            for name, value in written["metrics"].items()
            if name.startswith(prefix)
        }
        for measure, value in ours.items():
            of_pictures = measure == "seconds_per_image"
            numbers[timing["system"], timing["size"], measure] = Number(
                value,
                min(seconds) if of_pictures else None,
                max(seconds) if of_pictures else None,
                len(seconds),
            )
    machine = written["machine"]
    notes = (machine.get("gpu") or machine["cpu"],)
    notes += tuple(f"{name}: {reason}" for name, reason in written["failed_systems"].items())
    notes += tuple(
        f"{timing['system']} at {timing['size']}: {timing['error']}"
        for timing in written["timings"]
        if timing["error"]
    )
    return Record(folder, "runtime", numbers, asked=written["asked"]["sampling"], notes=notes)


def _from_judge(folder: Path) -> Record:
    written = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    system = written.get("a", folder.name)
    numbers: dict[tuple[str, str, str], Number] = {}
    for question, part in written["questions"].items():
        if part["win_rate_a"] is None:
            continue
        low, high = (100.0 * end for end in part["win_rate_interval"])
        count = sum(part[name] for name in ("a", "b", "tie"))
        numbers[system, "", question] = Number(100.0 * part["win_rate_a"], low, high, count)
    notes = [f"{system} over {written.get('b', 'the other folder')}, judged by {written['model']}"]
    notes += [
        f"{question}: {line}"
        for question, part in written["questions"].items()
        for line in part["warnings"]
    ]
    prompts = {name: part.get("prompt", "") for name, part in written["questions"].items()}
    return Record(folder, "", numbers, protocols=prompts, notes=tuple(notes))


def read_record(folder: Path) -> Record:
    """What a folder of this project's commands holds.

    Raises:
        ValueError: none of them wrote it, or not whole.
    """
    try:
        if (folder / "runtime.json").is_file():
            return _from_runtime(folder)
        if (folder / "summary.json").is_file():
            return _from_judge(folder)
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{folder}: not readable ({problem}); run its command again") from None
    return _from_evaluation(folder)


def read_judged(folder: Path) -> Record:
    """What `ultraflux judge` left in a folder.

    Raises:
        ValueError: it left nothing there, or not whole.
    """
    made_by = "name the --output of a finished `ultraflux judge`"
    return _holding(folder, "summary.json", f"no judgement (summary.json); {made_by}")


def read_timed(folder: Path) -> Record:
    """What the runtime suite left in a folder.

    Raises:
        ValueError: it left nothing there, or not whole.
    """
    made_by = "name the --out of a finished `ultraflux evaluate runtime`"
    return _holding(folder, "runtime.json", f"no times (runtime.json); {made_by}")


def _holding(folder: Path, file: str, otherwise: str) -> Record:
    """A record of one kind, told by its file; `otherwise` says what is wrong with the folder."""
    if not (folder / file).is_file():
        raise ValueError(f"{folder}: {otherwise}")
    return read_record(folder)


def default_records(table: PublishedTable, root: Path) -> list[Record]:
    """What the commands left at their default places for a table; other folders are skipped.

    Args:
        table: what is to be filled.
        root: of the project.
    """
    if table.filling == "ablation":
        trees = [(arm.name, root / ABLATIONS / design / arm.name / _ARM) for design, arm in _arms()]
        return [
            _from_evaluation(folder, table.suite, name)
            for name, folder in trees
            if folder.relative_to(root / ABLATIONS).parts[0] == table.suite
            and (folder / "metrics.json").is_file()
        ]
    if table.filling == "judge":
        folder = root / JUDGED
        return [read_record(folder)] if (folder / "summary.json").is_file() else []
    mark = "runtime.json" if table.filling == "runtime" else "metrics.json"
    found = []
    for path in sorted((root / EVALUATIONS).glob(f"*/{mark}")):
        try:
            record = read_record(path.parent)
        except ValueError:
            # Somebody's half-made folder is not asked about; given with --from it is an error.
            continue
        if record.about == table.suite:
            found.append(record)
    return found


def _arms() -> list[tuple[str, Any]]:
    return [(design, arm) for design, arms in DESIGNS.items() for arm in arms]


def given_records(table: PublishedTable, folders: Sequence[Path]) -> list[Record]:
    """Records of folders that a person named.

    An ablation's arm is named by its tree, or by the evaluation of its model within; systems of
    another evaluation keep their names.

    Raises:
        ValueError: a folder that holds none, several systems as one arm, or nothing of this table.
    """
    records = []
    for folder in folders:
        record = _given_arm(table, folder) if table.filling == "ablation" else read_record(folder)
        if not {*record.missing, *(name for _, _, name in record.numbers)} & set(table.metrics):
            raise ValueError(
                f"{folder}: {record.suite or record.about or 'a judgement'} has no number of the "
                f"table {table.name} ({', '.join(table.metrics)})"
            )
        records.append(record)
    return records


def _given_arm(table: PublishedTable, folder: Path) -> Record:
    inside = folder / _ARM if (folder / _ARM).is_dir() else folder
    # As it was given, also where it is a link; a relative path need not have its tree's name.
    *_, tree, runs, name = ("", "", *Path(os.path.abspath(inside)).parts)
    is_arm = (runs, name) == _ARM.parts
    return _from_evaluation(inside, table.suite, tree if is_arm else "")
