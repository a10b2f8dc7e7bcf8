"""Entries of dvc.lock that travel between clones: which are needed, merged, believed.

A machine without the data cannot ask `dvc status`; what it can do is compare hashes. An entry is
believed when every dependency that a stage makes has the hash which that stage's entry gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.files.whole_files import write_text
from flows.versioning.code_files import CODE, CodeChanges, code_path
from flows.versioning.graph import StageNode, load_stage, open_repo, read_lock
from flows.versioning.lock_hashes import dep_hashes, out_hashes
from flows.versioning.source_listing import SOURCE, source_changes

LockEntry = Mapping[str, Any]


def needed_entries(
    graph: Mapping[str, StageNode], lock: Mapping[str, LockEntry], name: str
) -> dict[str, Any]:
    """What another clone must know of dvc.lock to run `name`: its ancestors' entries and its own.

    Args:
        graph: all stages.
        lock: `stages` of dvc.lock.
        name: the stage.
    """
    wanted, waiting = {name}, [name]
    while waiting:
        for upstream in graph[waiting.pop()].upstream:
            if upstream not in wanted:
                wanted.add(upstream)
                waiting.append(upstream)
    return {stage: entry for stage, entry in lock.items() if stage in wanted}


def made_hashes(lock: Mapping[str, LockEntry]) -> dict[str, str]:
    """DVC hash by path of everything that the stages of `lock` made."""
    return {path: value for entry in lock.values() for path, value in out_hashes(entry).items()}


def foreign_inputs(entry: LockEntry, lock: Mapping[str, LockEntry]) -> list[str]:
    """Dependencies of an entry whose hash is not the one that their stage in `lock` made."""
    made = made_hashes(lock)
    return [
        path for path, value in dep_hashes(entry).items() if path in made and made[path] != value
    ]


def merge_entries(root: Path, entries: Mapping[str, LockEntry]) -> None:
    """Put entries into dvc.lock under DVC's own lock; the other stages' entries stay.

    The file is replaced as a whole, so a reader or a kill never meets half of it.
    """
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    path = root / "dvc.lock"
    with open_repo(root) as repo, repo.lock:
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        # DVC's own reader and writer: the file looks as if DVC had written it, and a diff shows
        # entries.
        document = parse_yaml_for_update(before, str(path))
        document.setdefault("schema", "2.0")
        stages = document.setdefault("stages", {})
        # Nothing is written where nothing differs: `git status` of a worker stays clean.
        changed = {name: entry for name, entry in entries.items() if stages.get(name) != entry}
        if not changed:
            return
        stages.update(changed)
        write_text(path, dumps_yaml(document), contended=True)


def stale_without_data(root: Path, graph: Mapping[str, StageNode]) -> dict[str, str]:
    """Stages that have to run, each with a reason, on a clone that need not have their data.

    Files that no stage makes (code, contracts, photographs) are hashed here; what a stage makes is
    compared by the hashes in dvc.lock. `graph.stale_stages` also asks whether outputs
    lie in the workspace; here they may lie in the remote alone.
    """
    lock = read_lock(root)
    made = made_hashes(lock)
    makers = {path: name for name, node in graph.items() for path in node.outputs}
    reasons: dict[str, str] = {}
    code = CodeChanges(root)
    with open_repo(root) as repo:
        for name, node in graph.items():
            stage = load_stage(repo, root, name)
            if name not in lock:
                reasons[name] = "never run"
            elif not stage.frozen and (changed := _changes(stage, lock[name], made, makers, code)):
                reasons[name] = "; ".join(changed)
            elif behind := [up for up in node.upstream if up in reasons and up != CODE]:
                reasons[name] = f"after {', '.join(behind)}"
    return reasons


def _changes(
    stage: Any,
    entry: LockEntry,
    made: Mapping[str, str],
    makers: Mapping[str, str],
    code: CodeChanges,
) -> list[str]:
    """What of a stage differs from its entry; its code by meaning, of the files that are here."""
    changes = ["changed command"] if stage.changed_stage() else []
    if {out.def_path for out in stage.outs} != set(out_hashes(entry)):
        changes.append("changed outs")
    if stage.name == CODE:
        return changes if changes or code.written() else [*changes, "its files"]
    known = dep_hashes(entry)
    if stage.name == SOURCE:
        changed = source_changes(code.root, entry, read=True)
        changes += [changed] if changed else []
    for dep in stage.deps:
        path = str(dep.def_path)
        if path == code_path(stage.name):
            changed = code.since(stage.name, entry)
            changes += [changed] if changed else []
            continue
        # Its bytes may lie in the remote alone: hash against hash, no file is looked at.
        if path in makers:
            status = {} if known.get(path) == made.get(path) else {path: "modified"}
        else:
            status = dep.workspace_status()
        changes += [f"{what} ({how})" for what, how in status.items()]
    return changes
