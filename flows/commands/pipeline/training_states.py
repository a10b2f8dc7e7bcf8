"""`ultraflux stage key` and `stage states`: whose a training state is, and which there are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.telemetry.wording import age_text
from flows.commands.command_line import (
    Json,
    fail,
    print_json,
    project_root,
    refuse_unknown_stage,
    refusing,
)
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from components.training.distributed.run_states import RunIdentity, RunState

KEY_EPILOG = """Examples:

  ultraflux stage key dit_stage1

  ultraflux stage key dit_stage1 -S dit_stage1.learning_rate=5e-5

  ultraflux stage key vae --json

The first line names the state: runs/STAGE/ and its first 16 digits. A setting that is not listed
(an interval, a card, a number of processes) can be changed in the middle of a run, which goes on.
One that is listed meets the unfinished run: runtime.on_changed_run, --continue-from, --restart."""
STATES_EPILOG = """Examples:

  ultraflux stage states

  ultraflux stage states dit_stage1 --prune

  ultraflux run --continue-from dit_stage1/0123456789abcdef

--prune removes states that another one went on from, finished ones but the newest of each stage,
and empty ones; unfinished work that nobody went on from stays."""


def stage_key(
    name: Annotated[str, typer.Argument(help="Stage in dvc.yaml that trains.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("-S", "--set", help="section.key=value: as if params.yaml said so."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the identity of a stage's training state, and the settings that are in it."""
    from components.settings.schema import SettingsError
    from flows.versioning.graph import GraphError
    from flows.versioning.setting_overrides import merged, parse_assignments, read_params

    root = project_root()
    refuse_unknown_stage(root, name)
    with refusing(GraphError, SettingsError):
        values = merged(read_params(root), parse_assignments(settings or []))
        from flows.running.training_state import clone_identity

        _refuse_untrained(root, name)
        identity = clone_identity(root, name, values)
    if as_json:
        print_json({"key": identity.key, **identity.model_dump(mode="json")})
        return
    print(identity.key)
    for title, entries in (
        ("settings", identity.settings),
        ("weights to start from", identity.weights),
        ("data", identity.data),
    ):
        if entries:
            print(f"\n{title}")
        for entry, value in entries.items():
            print(f"  {entry}: {value}")
    print(f"\ncode\n  {identity.code}")


def _refuse_untrained(root: Path, name: str) -> None:
    from flows.versioning import graph as versioning

    if not versioning.stage_node(root, name).meta.trains:
        trains = [one for one, node in versioning.stage_graph(root).items() if node.meta.trains]
        raise fail(f"{name} trains nothing; stages that do: {', '.join(trains)}")


def stage_states(
    name: Annotated[str | None, typer.Argument(help="One stage (default: all that train).")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove states that nothing needs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """List the training states of this clone: step, size, age, and what each differs in."""
    root = project_root()
    refuse_unknown_stage(root, name)
    from components.training.distributed.run_states import (
        lost_states,
        read_states,
        remove_state,
        unneeded,
    )
    from flows.running.training_state import present_identity
    from flows.versioning import graph as versioning

    with refusing(versioning.GraphError):
        if name is not None:
            _refuse_untrained(root, name)
        graph = versioning.stage_graph(root)
    stages = [one for one, node in graph.items() if node.meta.trains and name in (None, one)]
    rows: list[dict[str, Any]] = []
    for stage in stages:
        states = read_states(root / "runs" / stage)
        current = present_identity(root, stage)
        key = None if current is None else current.key
        gone = {state.name: reason for state, reason in unneeded(states, key)}
        for state in states:
            removed = prune and state.name in gone
            rows.append(_row(state, current, gone.get(state.name, ""), removed))
            if removed:
                remove_state(state)
        rows += [_row(state, None, "", False) for state in lost_states(root / "runs" / stage)]
    if as_json:
        print_json(rows)
        return
    _print_table(rows)
    if prune:
        removed_mib = [row["mib"] for row in rows if row["removed"]]
        print(f"{len(removed_mib)} removed, {sum(removed_mib):.1f} MiB freed.")


def _row(
    state: RunState, current: RunIdentity | None, reason: str, removed: bool
) -> dict[str, Any]:
    from components.training.distributed.run_states import described

    if not state.segments:
        differs = "state.json cannot be read"
    elif current is None:
        differs = "inputs are not here"
    elif current.key == state.identity.key:
        differs = "current"
    else:
        differs = described(state.identity.changes_to(current), 3)
    return {
        "state": state.name,
        "step": state.step,
        "steps": state.steps,
        "status": _status(state),
        "device_hours": state.seconds() * state.processes / 3600,
        "mib": state.size_bytes() / 2**20,
        "age_s": max(0.0, time.time() - state.modified()),
        "differs": differs,
        "not_needed": reason,
        "segments": [str(segment) for segment in state.segments],
        "removed": removed,
    }


def _status(state: RunState) -> str:
    # One that can be read has a first segment.
    if not state.segments:
        return "not readable"
    if state.damaged is not None:
        return "damaged"
    return "finished" if state.finished else "unfinished"


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        terminal().print("no training states")
        return
    cells = []
    for row in rows:
        words = row["differs"]
        if row["not_needed"]:
            words += f" [{'removed' if row['removed'] else 'not needed'}: {row['not_needed']}]"
        cells.append(
            (
                row["state"],
                f"{row['step']} of {row['steps'] or '?'}",
                row["status"],
                f"{row['device_hours']:.2f}",
                f"{row['mib']:.1f}",
                age_text(row["age_s"]),
                words,
            )
        )
    columns = ("state", "step", "status", "device h", "MiB", "age", "against the settings now")
    # The state stays whole, because it is what --continue-from takes.
    terminal().print(table_of(columns, cells, whole=(0,), folded=range(1, len(columns))))
