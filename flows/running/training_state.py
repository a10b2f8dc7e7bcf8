"""Where a stage that trains keeps its state, and what happens when it meets one of another past.

The state belongs to the run's identity (`components.training.distributed.run_states`), not to the
stage key: an interval of checkpoints, a card or a number of processes is no reason to begin again.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.settings import effects
from components.settings.schema import Settings, load_settings, parse_settings
from components.training.distributed.checkpoint_folders import checkpoint_folders
from components.training.distributed.run_states import (
    CHECKPOINTS,
    KEY_DIGITS,
    STATE_FILE,
    RunIdentity,
    RunState,
    Segment,
    StateRefused,
    begin_state,
    continue_from,
    described,
    lost_states,
    read_state,
    read_states,
    resume_state,
)
from flows.stages.contract import state_folder
from flows.versioning import graph as versioning
from flows.versioning.code_files import code_path
from flows.versioning.graph import read_stages
from flows.versioning.parameters import stage_parameters

CONTINUE_FROM = "ULTRAFLUX_CONTINUE_FROM"
"""Environment variable: the state, as STAGE/KEY, that a stage goes on from."""
RESTART = "ULTRAFLUX_RESTART"
"""Environment variable: stages begin at step 0 whatever unfinished state is there."""
AT_STAKE_S = 600.0
"""Work that may be begun again without asking."""
_EDGE = 2**20
_LISTED = 12


@dataclass(frozen=True)
class Wish:
    """What the person, or the settings, want done with an unfinished state of another past."""

    on_changed: str
    """`refuse`, `continue` or `restart`."""
    continue_from: str | None = None
    """STAGE/KEY (a beginning of the key is enough); stages of other names are not meant."""
    restart: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Wish:
        """From the settings, and the environment that the command's options set."""
        return cls(
            settings.runtime.on_changed_run,
            os.environ.get(CONTINUE_FROM) or None,
            bool(os.environ.get(RESTART)),
        )

    def names(self, stage: str) -> bool:
        """Whether a state of this stage is to be gone on from."""
        return self.continue_from is not None and self.continue_from.partition("/")[0] == stage


def identity_of(
    root: Path, stage: str, settings: Settings, inputs: Mapping[str, str]
) -> RunIdentity:
    """The identity of a run of `stage`.

    Args:
        root: repository root.
        stage: that trains.
        settings: of which those count that dvc.yaml declares for it. Whole ones, because a default
            that is written out is the same setting as one that is not.
        inputs: DVC hash by path of its dependencies.
    """
    parameters = stage_parameters(root, stage, settings.model_dump(mode="json"))
    seen = {name: value for name, value in parameters.items() if not effects.only_seen(stage, name)}
    code = inputs.get(code_path(stage), "")
    return RunIdentity(
        stage=stage,
        settings=effects.deciding(seen),
        weights={
            name: _content(root / place) for name, place in sorted(effects.naming(seen).items())
        },
        data={path: inputs[path] for path in sorted(inputs) if path != code_path(stage)},
        code=code,
    )


def clone_identity(
    root: Path, stage: str, settings: Mapping[str, Any] | None = None
) -> RunIdentity:
    """`identity_of` with the inputs that the clone has now.

    Args:
        root: repository root.
        stage: that trains.
        settings: nested; None: those of params.yaml.

    Raises:
        GraphError: no such stage, or an input is not there.
        SettingsError: settings that are none.
    """
    _, inputs = versioning.stage_identity(root, stage)
    here = load_settings(root / "params.yaml") if settings is None else parse_settings(settings)
    return identity_of(root, stage, here, inputs)


def present_identity(root: Path, stage: str) -> RunIdentity | None:
    """The identity that settings, inputs and code give now; None: an input is not there."""
    try:
        return clone_identity(root, stage)
    except versioning.GraphError:
        return None


def stage_state_folder(root: Path, stage: str) -> Path:
    """Where a stage keeps its state with the inputs, settings and code that the clone has now.

    Raises:
        GraphError: no such stage, or an input is not there.
    """
    trains = versioning.stage_node(root, stage).meta.trains
    key = clone_identity(root, stage).key if trains else versioning.stage_key(root, stage)
    return state_folder(root, stage, key)


def _content(path: Path) -> str:
    """Digest of names and sizes below a path, and of the first and last MiB of every file.

    Weights are too large to be read whole at every start; two sets of the same architecture differ
    in nearly every byte, also in these.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        # Notes of a download, not weights.
        if any(part.startswith(".") for part in name.split("/")):
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()


def open_state(root: Path, identity: RunIdentity, wish: Wish, processes: int) -> RunState:
    """The state that a stage works on now, its folder made.

    Args:
        root: repository root.
        identity: of the run.
        wish: about unfinished states of another past.
        processes: of the run, on all nodes.

    Raises:
        StateRefused: an unfinished state differs and nobody said what to do; the line and what
            follows say what differs, how far it is, what it cost, and what can be done.
    """
    stage = identity.stage
    folder = state_folder(root, stage, identity.key)
    # The same identity: nothing that decides has changed, so there is nothing to ask.
    own = read_state(folder)
    if own is not None:
        if wish.names(stage) and not own.name.startswith(str(wish.continue_from)):
            _say(
                f"{stage}: {own.name}, the state of these very settings, data and code, goes on at "
                f"step {own.step}; --continue-from {wish.continue_from} is not used"
            )
        elif wish.restart and own.step > 0:
            _say(
                f"{stage}: {own.name} goes on at step {own.step}: --restart is for a run of other "
                f"settings, data or code; to begin this one again, move or "
                f"delete {own.folder}"
            )
        return resume_state(own, processes)
    if checkpoint_folders(folder / CHECKPOINTS):
        # Brought here from a clone that was lost, or its state.json was damaged.
        if (folder / STATE_FILE).exists():
            _say(f"{stage}: {folder / STATE_FILE} cannot be read; what it said of segments is lost")
        return begin_state(folder, identity, processes)
    others = read_states(folder.parent)
    if wish.continue_from is not None and wish.names(stage):
        chosen = _named(others, wish.continue_from)
        _say(f"{stage}: goes on from {chosen.name} at step {chosen.step}")
        return continue_from(chosen, folder, identity, processes)
    # Newest first: that is the work which a person has in mind.
    unfinished = next((s for s in others if _is_open(s)), None)
    if unfinished is None:
        _ask_about_lost(lost_states(folder.parent), wish)
        _offer_finished(others, identity)
        return begin_state(folder, identity, processes)
    changes = described(unfinished.identity.changes_to(identity))
    at = f"{unfinished.name} at step {unfinished.step} of {unfinished.steps}"
    if unfinished.damaged is not None:
        at += f" ({unfinished.damaged[1]} is damaged)"
    if wish.restart or wish.on_changed == "restart":
        _say(f"{stage}: begins at step 0; the unfinished {at} stays ({changes})")
        return begin_state(folder, identity, processes)
    if wish.on_changed == "continue":
        _say(f"{stage}: goes on from {at} under {changes}")
        return continue_from(unfinished, folder, identity, processes)
    seconds = unfinished.seconds()
    # Small runs are changed and repeated all day long: a question at each would only be answered by
    # habit.
    if seconds <= AT_STAKE_S:
        _say(
            f"{stage}: begins at step 0; the unfinished {at} ({seconds:.0f} s of "
            f"work) was made under other conditions: {changes}"
        )
        return begin_state(folder, identity, processes)
    raise StateRefused(_refusal(unfinished, identity, seconds))


def wished_stage(root: Path, name: str, stages: Collection[str]) -> str:
    """The stage that `--continue-from` means, which no stage of the run may leave unused.

    Args:
        root: repository root.
        name: STAGE/KEY as typed.
        stages: that are run.

    Raises:
        StateRefused: no such state, of no stage that trains, or of one that is not run.
    """
    trains = [one for one, said in read_stages(root).items() if said.get("meta", {}).get("trains")]
    stage, slash, _ = name.partition("/")
    if stage not in trains or not slash:
        raise StateRefused(
            f"--continue-from {name}: expected STAGE/KEY; stages that train: {', '.join(trains)}"
        )
    if stage not in stages:
        raise StateRefused(f"--continue-from {name}: {stage} is not part of this run")
    _named(read_states(root / "runs" / stage), name)
    return stage


def _is_open(state: RunState) -> bool:
    return not state.finished and state.continued_by is None and state.step > 0


def _named(states: list[RunState], name: str) -> RunState:
    found = [state for state in states if state.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(state.name for state in states) or "none"
    raise StateRefused(
        f"--continue-from {name}: {'several states begin so' if found else 'no such state'}; "
        f"`ultraflux stage states` lists them (here: {known})"
    )


def _ask_about_lost(states: list[RunState], wish: Wish) -> None:
    """A line about the newest state that cannot be read.

    Raises:
        StateRefused: nobody said what to do, and much work may be in it.
    """
    if not states:
        return
    state = states[0]
    seconds = state.seconds()
    file = state.folder / STATE_FILE
    at = f"{file} cannot be read; beside it is a checkpoint of step {state.step}"
    stage = state.identity.stage
    if seconds <= AT_STAKE_S or wish.restart or wish.on_changed == "restart":
        _say(f"{stage}: begins at step 0; {at} ({seconds:.0f} s of work), which stays")
        return
    raise StateRefused(
        f"{stage}: {at} ({seconds / 3600:.2f} hours of work): bring state.json back, move or "
        "delete that folder, or begin again, keeping it: --restart"
    )


def _offer_finished(states: list[RunState], identity: RunIdentity) -> None:
    """One line about a finished run that could be gone on from."""
    for state in states:
        if state.finished and not state.identity.unloadable(identity):
            _say(
                f"{identity.stage}: begins at step 0; `--continue-from {state.name}` goes on from "
                f"the finished run of {state.step} steps instead "
                f"({described(state.identity.changes_to(identity), 3)})"
            )
            return


def _refusal(state: RunState, identity: RunIdentity, seconds: float) -> str:
    changes = state.identity.changes_to(identity)
    hours = seconds * state.processes / 3600
    lines = [
        f"{identity.stage}: an unfinished run is at step {state.step} of {state.steps} "
        f"({hours:.2f} device hours) and was made under other conditions:",
        *_listed(changes),
    ]
    if state.damaged is not None:
        lines.append(f"  its checkpoint is damaged, bring the file back: {state.damaged[1]}")
    elif hard := state.identity.unloadable(identity):
        lines.append(f"  its checkpoint does not fit the new {', '.join(hard)}")
    else:
        lines.append(
            f"  go on under the new ones:  --continue-from {state.name}  "
            "(or runtime.on_changed_run: continue)"
        )
    lines += [
        "  begin again, keeping it:   --restart  (or runtime.on_changed_run: restart)",
        "  or set back what differs, and it goes on as if nothing had happened",
    ]
    return "\n".join(lines)


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for number, name in enumerate(changes):
        if number == _LISTED:
            yield f"    and {len(changes) - _LISTED} more"
            return
        yield f"    {described({name: changes[name]})}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def segment_tags(segments: tuple[Segment, ...]) -> dict[str, str]:
    """Tags of a run's record: none for an undisturbed one, else a line for each segment."""
    if len(segments) < 2:
        return {}
    return {
        f"segments.{number}": f"{segment.key[:KEY_DIGITS]} {segment}"
        for number, segment in enumerate(segments, 1)
    }
