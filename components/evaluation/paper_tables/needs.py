"""What an empty cell of a published table needs here, each with the command that gets it.

Looked for on this disk: the benchmark's copy, the metric's and the system's weights. Everything is
named before anything is computed, so that a table says how to fill it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.evaluation.paper_tables.records import EVALUATIONS, Record
from components.evaluation.suites.suites import SuiteMissing, load_suite
from components.evaluation.suites.systems import PRESETS
from components.files.install_hints import download_command
from components.metrics.cards import CARDS, card, status
from components.metrics.published import PublishedRow, PublishedTable

ABLATION_SUITE = "aesthetic-eval-4096"
"""What the papers measure their ablations on."""
_GETS = "get it with: "
_METRICS = {c.id for c in CARDS}


@dataclass(frozen=True)
class Need:
    """One thing that a cell lacks."""

    what: str
    command: str = ""
    """Empty where no command of ours gets it."""


def needs_of(
    table: PublishedTable, row: PublishedRow, measure: str, record: Record | None, root: Path
) -> tuple[Need, ...]:
    """What has to be there for one cell, in the order in which to get it.

    Args:
        table: the published one.
        row: the printed row whose counterpart has no number.
        measure: of the column.
        record: of the same system, if something of it was measured; None else.
        root: of the project.
    """
    found = list(_suite(table, root))
    if record is not None and measure in record.missing:
        what, _, command = record.missing[measure].partition(f"; {_GETS}")
        found.append(Need(what, command))
    elif measure in _METRICS:
        found += _metric(measure, root)
    if table.filling in ("evaluation", "runtime"):
        found += _system(table, row, root)
    if table.filling == "runtime" and not shutil.which("nvidia-smi"):
        found.append(Need("a GPU: none is seen here"))
    if _is_measurable(table, row):
        found.append(Need("measured", command_of(table, row)))
    return tuple(dict.fromkeys(found))


def _suite(table: PublishedTable, root: Path) -> Iterator[Need]:
    suite = {"evaluation": table.suite, "ablation": ABLATION_SUITE}.get(table.filling)
    if suite is None:
        return
    try:
        load_suite(suite, root)
    except SuiteMissing as problem:
        what, _, command = str(problem).partition(f"; {_GETS}")
        yield Need(what, command)
    except ValueError as problem:
        yield Need(str(problem))


def _metric(metric: str, root: Path) -> Iterator[Need]:
    found = card(metric)
    state, colon, command = status(found, (), root / "weights").partition("weights missing: ")
    if colon and not state:
        yield Need(f"weights of {found.name}", command)


def _system(table: PublishedTable, row: PublishedRow, root: Path) -> Iterator[Need]:
    kind, colon, rest = row.spec.partition(":")
    if row.spec in PRESETS:
        preset = PRESETS[row.spec]
        if not (root / "weights" / preset.folder).is_dir():
            yield Need(f"weights of {row.label}", preset.command)
    elif colon and not (root / rest).is_dir():
        command = ""
        if kind == "vae":
            folder = str(Path(rest).parent)
            command = download_command("Owen777/UltraFlux-v1", folder, include=("vae/*",))
        yield Need(f"{rest}: {_HOLDS.get(kind, 'weights')} of {row.label}", command)
    elif not colon and table.filling == "runtime":
        yield Need(f"{row.label}: a program whose start would be timed with its pictures")
    elif not colon and not (root / row.spec).is_dir():
        yield Need(f"{row.spec}/: pictures of {row.label}, named after the suite's items")


_HOLDS = {"diffusers": "a saved diffusers pipeline", "vae": "an autoencoder"}


def command_of(table: PublishedTable, row: PublishedRow) -> str:
    """The command that measures a printed row's counterpart, with all rows that it can measure.

    Systems that are asked with the same options go into one folder. A table with options, and each
    further group of it, has a folder of its own: a folder holds one way of asking.
    """
    options = table.all_options(row.system)
    words = ["ultraflux"]
    if table.filling in ("evaluation", "runtime"):
        able = [one for one in table.rows if _is_measurable(table, one)]
        together = [one for one in able if table.all_options(one.system) == options]
        words += ["evaluate", table.suite]
        for system, spec in dict.fromkeys((one.system, one.spec) for one in together):
            words += ["--system", f"{system}={spec}"]
        further = "" if together[0] == able[0] else f"-{together[0].system}"
        if options:
            words += ["--out", str(EVALUATIONS / f"{table.name}{further}")]
    elif table.filling == "ablation":
        words += ["ablate", table.suite, "--suite", ABLATION_SUITE]
    else:
        words += ["judge"]
        words += [word for question in table.metrics for word in ("--question", question)]
    if table.filling in ("evaluation", "ablation"):
        words += ["--metrics", ",".join(table.metrics)]
    return " ".join(filter(None, (shlex.join(words), options)))


def _is_measurable(table: PublishedTable, row: PublishedRow) -> bool:
    """Pictures that exist have no time per picture."""
    return not (table.filling == "runtime" and row.spec.startswith("pictures/"))
