"""A rehearsal: every corpus stage over the first items of the source, in a folder of its own.

What would fail after hours fails within minutes. The stages are those of dvc.yaml up to `slices`,
run by their modules as the pipeline runs them, contracts and endpoints included; outputs, journals
and downloads stay below `runs/rehearsal`, and neither `data/` nor dvc.lock is touched. Answers of a
caption endpoint are kept where the pipeline finds them, so that nothing is paid twice.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from components.corpus.source_sample import copy_sample, count_items
from components.files.whole_files import write_text
from components.settings.schema import Settings, load_settings
from components.telemetry.last_words import last_words
from components.telemetry.metric_log import MetricLog
from flows.stages.contract import InputMissing, StageContext
from flows.versioning.code_files import CODE
from flows.versioning.graph import stages_until

ITEMS = 100
MANY_ITEMS = 300
"""A run over more items than this is rehearsed by itself."""
FOLDER = Path("runs") / "rehearsal"
OUTCOME = Path("runs") / "rehearsal.json"
_LAST = "slices"
_OWN = {"data", "runs", ".git", ".dvc"}
_PAID = ("caption-requests.sqlite",)


class RehearsalFailed(RuntimeError):
    """A stage would fail; one line."""


@dataclass(frozen=True)
class StageRehearsal:
    """One stage over the sample."""

    stage: str
    seconds: float
    rows_in: int | None
    rows_out: int | None
    said: str
    """Summary, or what failed."""
    status: Literal["ok", "failed", "not reached"]


@dataclass(frozen=True)
class Rehearsal:
    """All stages."""

    items: int
    total: int | None
    """Items of the whole source; None: too many to count quickly."""
    stages: tuple[StageRehearsal, ...]
    rejected: dict[str, int]
    """Rows by reason, `kept` among them."""

    @property
    def problem(self) -> str | None:
        """The first line that a run would end with."""
        return next((stage.said for stage in self.stages if stage.status == "failed"), None)

    def projected_s(self, stage: StageRehearsal) -> float | None:
        """Seconds for the whole source, start-up times included."""
        if self.total is None or not self.items:
            return None
        return stage.seconds * self.total / self.items


def rehearse(root: Path, items: int = ITEMS, say: Callable[[str], None] = print) -> Rehearsal:
    """Run the corpus stages over the first `items` of the source.

    Of a folder the photographs are spread over all of it; of lists and archives they are the first.

    Args:
        root: repository root.
        items: how many.
        say: receives the name of each stage as it begins.

    Raises:
        SettingsError: params.yaml is not valid.
        ValueError: the source is of no use; one line.
    """
    settings = load_settings(root / "params.yaml")
    total = count_items(settings.ingest, root)
    scratch = root / FOLDER
    # Begun anew: what an earlier sample left would make a stage look finished.
    shutil.rmtree(scratch, ignore_errors=True)
    stages = [name for name in stages_until(root, _LAST) if name != CODE]
    _furnish(root, scratch, stages)
    settings, taken = _narrowed(settings, root, scratch, items, total)
    done: list[StageRehearsal] = []
    for name in stages:
        say(f"rehearsal: {name}")
        done.append(_rehearsed(name, settings, scratch, items, done))
    return Rehearsal(taken, total, tuple(done), _reasons(scratch))


def _furnish(root: Path, scratch: Path, stages: list[str]) -> None:
    """Link everything of the clone that a stage may read, less what stages write."""
    for folder in (scratch / "data", scratch / "runs"):
        folder.mkdir(parents=True)
    for path in root.iterdir():
        if path.name not in _OWN:
            (scratch / path.name).symlink_to(path)
    for path in (root / "data").iterdir():
        if path.name not in stages:
            (scratch / "data" / path.name).symlink_to(path)
    for name in _PAID:
        # A link also where there is no file yet: what is paid for now is kept for the run.
        (scratch / "runs" / name).symlink_to(root / "runs" / name)


def _narrowed(
    settings: Settings, root: Path, scratch: Path, items: int, total: int | None
) -> tuple[Settings, int]:
    """Settings for the sample, and how many items it has."""
    ingest = settings.ingest
    taken = min(items, total) if total is not None else items
    if ingest.kind == "folder":
        # Named like the source, which the manifest's column `source` shows.
        source = Path("rehearsed") / Path(ingest.source).name
        taken = copy_sample(ingest, root, scratch / source, items, settings.caption.file)
        changed = ingest.model_copy(update={"source": source.as_posix()})
    else:
        changed = ingest.model_copy(update={"source": os.path.abspath(root / ingest.source)})
    settings = settings.model_copy(update={"ingest": changed})
    if total is None or total > taken:
        # Sizes that are meant for the whole: a sample could never reach them.
        slices = settings.slices.model_copy(update={"min_images": 1, "eval_min_images": 1})
        select = settings.select.model_copy(update={"target_images": None})
        settings = settings.model_copy(update={"slices": slices, "select": select})
    return settings, taken


def _rehearsed(
    name: str, settings: Settings, scratch: Path, items: int, before: list[StageRehearsal]
) -> StageRehearsal:
    """One stage, timed; whatever it raises is what it said."""
    state = scratch / "runs" / name
    state.mkdir(parents=True, exist_ok=True)
    metrics = MetricLog(state / "metrics.jsonl")
    context = StageContext(name, settings, scratch, state, metrics, first=items)
    rows_in = next((stage.rows_out for stage in reversed(before) if stage.rows_out), None)
    started = time.monotonic()
    try:
        said = importlib.import_module(f"flows.stages.{name}").run(context).summary
        status: Literal["ok", "failed", "not reached"] = "ok"
    except InputMissing as problem:
        # What an earlier stage would have written: its own failure is the news.
        failed_before = any(stage.status != "ok" for stage in before)
        said, status = str(problem), "not reached" if failed_before else "failed"
    except Exception as problem:
        # As `recorded_stage` does: any failure of a stage is one line, and the run goes on to say
        # what else would fail.
        lines = str(problem).splitlines() or [type(problem).__name__]
        said = lines[0] if lines[0].startswith(f"{name}:") else f"{name}: {lines[0]}"
        status = "failed"
    seconds = time.monotonic() - started
    return StageRehearsal(name, seconds, rows_in, _rows(scratch / "data" / name), said, status)


def _rows(folder: Path) -> int | None:
    """Rows of what a stage wrote: those kept where something was decided, else all."""
    for path in (folder / "manifest.parquet", folder / f"{folder.name}.parquet"):
        if path.is_file():
            table = pq.read_table(path)
            if "kept" in table.column_names and table["kept"].null_count == 0:
                return sum(table["kept"].to_pylist())
            return table.num_rows
    return None


def _reasons(scratch: Path) -> dict[str, int]:
    """Rows by the rule that rejected them, the most frequent first, and those kept."""
    for stage in ("caption", "select"):
        path = scratch / "data" / stage / "manifest.parquet"
        if path.is_file():
            reasons = pq.read_table(path, columns=["reject_reason"])["reject_reason"].to_pylist()
            return dict(Counter(reason or "kept" for reason in reasons).most_common())
    return {}


def settings_digest(root: Path) -> str:
    """Names the settings that were rehearsed."""
    return hashlib.sha256((root / "params.yaml").read_bytes()).hexdigest()


def write_outcome(root: Path, found: Rehearsal) -> None:
    """Keep what was found in `OUTCOME`."""
    outcome = asdict(found) | {"problem": found.problem, "settings": settings_digest(root)}
    write_text(root / OUTCOME, json.dumps(outcome, indent=2) + "\n")


def read_outcome(root: Path) -> dict[str, Any] | None:
    """The last rehearsal of the present settings; None: there is none."""
    try:
        outcome: dict[str, Any] = json.loads((root / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return outcome if outcome.get("settings") == settings_digest(root) else None


def is_due(root: Path, settings: Settings) -> bool:
    """Whether a run should be rehearsed: many items, and settings that have not passed yet."""
    outcome = read_outcome(root)
    # The same settings have passed; a failed rehearsal is made again, since its cause may lie
    # outside.
    if outcome is not None and outcome["problem"] is None:
        return False
    try:
        number = count_items(settings.ingest, root, at_most=MANY_ITEMS + 1)
    except ValueError:
        # The stage says the same in a moment.
        return False
    return number is None or number > MANY_ITEMS


def rehearse_if_due(root: Path, settings: Settings, *, otherwise: str) -> None:
    """Rehearse what has many items and has not been rehearsed, in a process of its own.

    Args:
        root: repository root.
        settings: of `params.yaml` there.
        otherwise: what a person sets to go on without.

    Raises:
        RehearsalFailed: a stage would fail.
    """
    if not is_due(root, settings):
        return
    print(
        f"Rehearsal: {ITEMS} items through the corpus stages first ({otherwise} leaves it out)",
        flush=True,
    )
    # What a stage imports and its settings of threads must not stay in the process of the run.
    done = subprocess.run(
        ["ultraflux", "corpus", "rehearse", "-n", str(ITEMS)], cwd=root, stderr=subprocess.PIPE
    )
    if done.returncode:
        said = last_words(done.stderr.decode(errors="replace"))
        raise RehearsalFailed(
            f"{said.removeprefix('error: ')}; the run would end there: correct it, or go on "
            f"all the same with {otherwise}"
        )
