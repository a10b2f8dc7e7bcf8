"""Training states on disk: whose they are, how far they are, and how one goes on from another.

A state is a folder `runs/<stage>/<key>/` with checkpoints and a metric log. Its key is the hash of
the run's identity: the settings that can change a weight, the data, the weights it starts from and
the code. `state.json` beside the checkpoints holds that identity in words, so that a run whose
identity differs can be told, key by key, what differs, instead of silently beginning again.

A run that goes on from the state of another identity is a segment: its folder begins with links to
that checkpoint (files of a checkpoint never change), and its past is written into `state.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.files.whole_files import write_text
from components.settings.effects import shapes_state, start_name
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import (
    LATEST_FILE,
    age,
    checkpoint_folders,
    damaged_after,
    is_rejected,
    newest_checkpoint,
    within_reach,
)
from components.training.distributed.checkpoints import CheckpointStore

STATE_FILE = "state.json"
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
KEY_DIGITS = 16
_CONTINUING, _REMOVING = ".continuing-", ".removing-"
_FORMAT = 1


class StateRefused(ValueError):
    """A run may not begin, or not go on, from the states that are there; one line and its list."""


class RunIdentity(BaseModel):
    """The past that decides a run: equal identities end in equal weights."""

    model_config = ConfigDict(frozen=True)

    stage: str
    settings: dict[str, Any]
    """By dotted name; those that can change a weight."""
    weights: dict[str, str]
    """Digest of what lies in the folders that settings name."""
    data: dict[str, str]
    """DVC hash by path of every input."""
    code: str
    """Fingerprint of the stage's code."""

    @property
    def key(self) -> str:
        """64 hexadecimal digits; the first `KEY_DIGITS` name the folder."""
        text = json.dumps(_canonical(self.model_dump(mode="json")), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def changes_to(self, other: RunIdentity) -> dict[str, tuple[Any, Any]]:
        """(here, there) of everything that differs, by name: a setting, a path, or `code`."""
        pairs: dict[str, tuple[Any, Any]] = {}
        for here, there in (
            (self.settings, other.settings),
            (self.weights, other.weights),
            (self.data, other.data),
        ):
            for name in sorted(here.keys() | there.keys()):
                if here.get(name) != there.get(name):
                    pairs[name] = (here.get(name), there.get(name))
        if self.code != other.code:
            pairs["code"] = (self.code, other.code)
        return pairs

    def unloadable(self, other: RunIdentity) -> list[str]:
        """Names of changes under which a checkpoint of this identity cannot be loaded."""
        start = start_name(self.stage, self.settings, self.weights)
        began_with = {*self.weights, *other.weights, start}
        return [
            name
            for name in self.changes_to(other)
            if name in began_with or shapes_state(self.stage, name)
        ]


def _canonical(value: Any) -> Any:
    """`value` with whole numbers as floats: 0 and 0.0 are one setting, written twice."""
    if isinstance(value, dict):
        return {name: _canonical(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    # By type, since a bool is an int and True is not 1.0 of a setting.
    return float(value) if type(value) is int else value


class Segment(BaseModel):
    """Steps of a run under one identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_step: int
    """Optimizer steps done when it began."""
    key: str
    changes: dict[str, tuple[Any, Any]]
    """(before, since) by name; empty for the first."""

    def __str__(self) -> str:
        """One clause for people."""
        if not self.changes:
            return f"from step {self.from_step}"
        return f"from step {self.from_step}: {described(self.changes)}"


@dataclass(frozen=True)
class RunState:
    """One state folder, of which only small files have been read."""

    folder: Path
    identity: RunIdentity
    segments: tuple[Segment, ...]
    finished: bool
    """Its weights have been exported."""
    continued_by: str | None
    """Key of the state that went on from it."""
    processes: int
    """That worked on it last."""
    checkpoint: tuple[int, Path] | None
    """(step, folder) of its newest whole checkpoint."""
    damaged: tuple[int, Path] | None = None
    """(step, file at fault) of its newest checkpoint; None: one is whole, or there is none."""

    @property
    def name(self) -> str:
        """How commands name it, such as dit_stage1/0123456789abcdef."""
        return f"{self.identity.stage}/{self.folder.name}"

    @property
    def step(self) -> int:
        """Steps that its newest checkpoint holds, or held before it was damaged."""
        newest = self.checkpoint or self.damaged
        return 0 if newest is None else newest[0]

    @property
    def steps(self) -> int:
        """Steps that its settings ask for; 0: they do not say."""
        return int(self.identity.settings.get(f"{self.identity.stage}.steps", 0))

    def seconds(self) -> float:
        """Time that its steps took, by the metric log."""
        return _seconds(self.folder / METRICS_FILE, self.step)

    def size_bytes(self) -> int:
        """What removing it would free: files that another state is linked to do not count."""
        files = (path.stat() for path in self.folder.rglob("*") if path.is_file())
        return sum(status.st_size for status in files if status.st_nlink == 1)

    def modified(self) -> float:
        """When it was last written to, in seconds since 1970."""
        times = [self.folder.stat().st_mtime]
        for name in (METRICS_FILE, STATE_FILE, f"{CHECKPOINTS}/{LATEST_FILE}"):
            if (self.folder / name).is_file():
                times.append((self.folder / name).stat().st_mtime)
        return max(times)


def described(changes: Mapping[str, tuple[Any, Any]], limit: int | None = None) -> str:
    """Such as "dit_stage1.steps 24 -> 30, data/latents"; hashes are not spelled out."""
    parts = []
    for name, (before, after) in changes.items():
        is_hash = name == "code" or name.startswith("data/") or name.endswith(".pretrained")
        parts.append(name if is_hash else f"{name} {before} -> {after}")
    shown = parts if limit is None else parts[:limit]
    more = f" and {len(parts) - len(shown)} more" if len(shown) < len(parts) else ""
    return ", ".join(shown) + more


def _seconds(log: Path, until: int) -> float:
    if not log.is_file():
        return 0.0
    rows = MetricLog(log).rows()
    return sum(row.get("step_s", 0.0) for row in rows if row["step"] <= until)


def read_state(folder: Path) -> RunState | None:
    """The state in a folder; None: it holds none (or a kill came before it had a name).

    Raises:
        CheckpointUnreadable, CheckpointAway: it cannot be told.
    """
    with within_reach(folder):
        try:
            kept = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if kept["format"] != _FORMAT:
                return None
            state = RunState(
                folder=folder,
                identity=RunIdentity.model_validate(kept["identity"]),
                segments=tuple(Segment.model_validate(one) for one in kept["segments"]),
                finished=bool(kept["finished"]),
                continued_by=kept["continued_by"],
                processes=int(kept["processes"]),
                checkpoint=None,
            )
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None
    return _with_checkpoint(state)


def _with_checkpoint(state: RunState) -> RunState:
    folder = state.folder / CHECKPOINTS
    newest = newest_checkpoint(folder)
    damaged = {} if newest is not None else damaged_after(folder, None)
    at_fault = next(((age(path.name)[0], file) for path, file in damaged.items()), None)
    return replace(state, checkpoint=newest, damaged=at_fault)


def read_states(folder: Path) -> list[RunState]:
    """All states below `runs/<stage>`, the one last written to first."""
    if not folder.is_dir():
        return []
    # What a kill left half made, or half removed, can have a state.json, too.
    whole = (path for path in folder.iterdir() if path.is_dir() and not _is_part(path))
    found = (read_state(path) for path in whole)
    states = [state for state in found if state is not None]
    return sorted(states, key=lambda state: (-state.modified(), state.name))


def lost_states(folder: Path) -> list[RunState]:
    """States below `runs/<stage>` that hold a checkpoint and no state.json that can be read.

    Whose they are is not known: their identity is empty but for the stage.
    """
    if not folder.is_dir():
        return []
    nobody = RunIdentity(stage=folder.name, settings={}, weights={}, data={}, code="")
    found = (
        _with_checkpoint(RunState(path, nobody, (), False, None, 1, None))
        for path in folder.iterdir()
        if path.is_dir() and not _is_part(path) and read_state(path) is None
    )
    lost = [state for state in found if state.checkpoint or state.damaged]
    return sorted(lost, key=lambda state: (-state.modified(), state.name))


def fragments(folder: Path) -> list[Path]:
    """Folders below `runs/<stage>` that a kill left half made, half removed or empty."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and (_is_part(path) or _is_empty(path))
    )


def _is_part(path: Path) -> bool:
    return path.name.startswith((_CONTINUING, _REMOVING))


def _is_empty(path: Path) -> bool:
    # Who has lost a state.json alone still has checkpoints.
    return not (path / STATE_FILE).exists() and not _holds_work(path)


def _holds_work(folder: Path) -> bool:
    """Whether a checkpoint of a step, whole or damaged, is there that was not rejected."""
    found = checkpoint_folders(folder / CHECKPOINTS)
    return any(step > 0 and not is_rejected(path) for step, path in found)


def write_state(state: RunState) -> RunState:
    """Write `state.json` into the state's folder, created when missing."""
    kept = {
        "format": _FORMAT,
        "identity": state.identity.model_dump(mode="json"),
        "segments": [segment.model_dump(mode="json") for segment in state.segments],
        "finished": state.finished,
        "continued_by": state.continued_by,
        "processes": state.processes,
    }
    state.folder.mkdir(parents=True, exist_ok=True)
    write_text(state.folder / STATE_FILE, json.dumps(kept, indent=1) + "\n", durable=True)
    return state


def begin_state(folder: Path, identity: RunIdentity, processes: int) -> RunState:
    """Begin a run at step 0 in `folder`."""
    first = Segment(from_step=0, key=identity.key, changes={})
    return write_state(RunState(folder, identity, (first,), False, None, processes, None))


def resume_state(state: RunState, processes: int) -> RunState:
    """Go on with a state as it is; another number of processes is noted as a segment.

    The same global batches follow, but sums over them are rounded in another order. A number under
    which no step was saved leaves no segment: it was refused, or taken back.
    """
    if state.processes == processes:
        return state
    segments = state.segments
    if state.step > 0:
        changes: dict[str, tuple[Any, Any]] = {}
        if len(segments) > 1 and segments[-1].from_step == state.step:
            changes = dict(segments[-1].changes)
            segments = segments[:-1]
        before, _ = changes.pop("processes", (state.processes, processes))
        if before != processes:
            changes["processes"] = (before, processes)
        if changes:
            last = Segment(from_step=state.step, key=state.identity.key, changes=changes)
            segments = (*segments, last)
    return write_state(replace(state, segments=segments, processes=processes))


def mark_finished(folder: Path) -> None:
    """Note that the weights of the state in `folder` have been exported."""
    state = read_state(folder)
    if state is not None and not state.finished:
        write_state(replace(state, finished=True))


def continue_from(old: RunState, folder: Path, identity: RunIdentity, processes: int) -> RunState:
    """Begin a state in `folder` with the newest checkpoint of another one, as a new segment.

    The old state keeps all it has. Killed at any moment, the call can be made again.

    Args:
        old: where to go on from.
        folder: of the new state; whatever lies there is no state.
        identity: of the new state.
        processes: that will work on it.

    Raises:
        StateRefused: the old state has no checkpoint, or none that this identity could load.
        CheckpointUnreadable: its only checkpoint is damaged.
    """
    if old.checkpoint is None and old.damaged is None:
        raise StateRefused(f"{old.name} has no checkpoint to go on from")
    if hard := old.identity.unloadable(identity):
        raise StateRefused(
            f"{old.name} cannot be gone on from: its checkpoint does not fit "
            f"{', '.join(hard)}; begin again (--restart), or set what it was made with"
        )
    # Looked through here, where an earlier one can still be taken in its place.
    store = CheckpointStore(old.folder / CHECKPOINTS, 1)
    found = store.latest_intact()
    if found is None:
        raise StateRefused(f"{old.name} has no checkpoint to go on from")
    step, checkpoint = found
    # A checkpoint beyond the last step would be exported as a result that no run of these settings
    # has.
    if 0 < int(identity.settings.get(f"{identity.stage}.steps", step)) < step:
        raise StateRefused(
            f"{old.name} is at step {step}, beyond {identity.stage}.steps; set more steps, or "
            "begin again (--restart)"
        )
    changes = old.identity.changes_to(identity)
    if old.processes != processes:
        changes["processes"] = (old.processes, processes)
    segments = (*old.segments, Segment(from_step=step, key=identity.key, changes=changes))
    # Filled aside and renamed: a folder that is there has its past and its checkpoint.
    aside = folder.with_name(f"{_CONTINUING}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / CHECKPOINTS).mkdir(parents=True)
    # Files of a checkpoint are written once: two names for one file are as good as a copy, and a
    # copy of a large run's state would take the disk that the run needs.
    shutil.copytree(checkpoint, aside / CHECKPOINTS / checkpoint.name, copy_function=_link)
    write_text(aside / CHECKPOINTS / LATEST_FILE, f"{checkpoint.name}\n", durable=True)
    if (old.folder / METRICS_FILE).is_file():
        shutil.copyfile(old.folder / METRICS_FILE, aside / METRICS_FILE)
        # Curves end where the checkpoint does: later steps belong to the state that is left.
        MetricLog(aside / METRICS_FILE).rewind(step)
    write_state(RunState(aside, identity, segments, False, None, processes, None))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    # Last: a kill before it leaves two states that can both be gone on from, and loses neither.
    write_state(replace(old, continued_by=identity.key))
    return _with_checkpoint(RunState(folder, identity, segments, False, None, processes, None))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source, target)


def unneeded(states: list[RunState], current: str | None) -> Iterator[tuple[RunState, str]]:
    """States that nothing needs, each with the reason, of one stage.

    Unfinished work that nobody went on from is always kept, and damaged checkpoints, and of the
    finished states the newest, from which a run with more steps can go on.

    Args:
        states: of the stage, newest first.
        current: key of the identity that the settings give now; never removed.
    """
    # A damaged one is nobody's start, and its files may come back: it is left to a person.
    whole = [state for state in states if state.damaged is None]
    newest_finished = next((state for state in whole if state.finished), None)
    for state in whole:
        if current is not None and state.identity.key == current:
            continue
        if not _holds_work(state.folder):
            yield state, "has no checkpoint"
        elif state.continued_by is not None:
            yield state, f"continued as {state.continued_by[:KEY_DIGITS]}"
        elif state.finished and state is not newest_finished:
            yield state, "finished, and a newer finished one is there"


def remove_state(state: RunState) -> None:
    """Delete a state's folder, so that a kill in the middle leaves no half of it behind."""
    gone = state.folder.with_name(f"{_REMOVING}{state.folder.name}")
    state.folder.rename(gone)
    shutil.rmtree(gone)
