"""DVC as the one definition of the stage graph, the cache and the versions.

Schedulers ask here which stages exist, what they need and which are stale; nothing about the graph
is written down twice.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from components.settings.field_errors import first_error
from flows.records.programs import dvc
from flows.versioning.code_files import CODE, CodeChanges, code_path
from flows.versioning.lock_hashes import cached_file, out_hashes
from flows.versioning.source_listing import ALWAYS_CHANGED, SOURCE, source_changes
from flows.versioning.torn_files import mend_after_kills, mend_lock

# dvc.Repo keeps per-process state that is not thread-safe. Reentrant, because a unit of work
# (`flows.versioning.clone`) asks several questions of one opened Repo.
_REPO_LOCK = threading.RLock()
_OPENED: dict[Path, Any] = {}
"""By root, what the holder of the lock has open."""


class StageMeta(BaseModel):
    """`meta` of a stage in dvc.yaml: what a scheduler needs to know to place it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pool: Literal["cpu", "gpu"]
    """Work pool."""
    gpus: int = Field(ge=0)
    cpus: int = Field(ge=1)
    mem_gb: float = Field(gt=0)
    """Peak memory of the stage with a few photographs, in GiB."""
    mem_gb_per_million: float = Field(default=0.0, ge=0)
    """What every million candidates adds to that."""
    est_minutes: float = Field(gt=0)
    retries: int = Field(ge=0, le=10)
    timeout_min: float = Field(gt=0)
    resumable: bool
    """Continues from its state after a kill."""
    trains: bool = False
    """Its state belongs to a training run, which settings that change no weight leave as it is."""
    gate: bool
    """May refuse to let the pipeline go on."""
    unversioned: Annotated[tuple[str, ...], Strict(False)] = ()
    """Folders that the stage writes and DVC neither versions nor removes: too many files for it.
    What is in them is found by content, and the stage itself drops what it needs no more."""

    def memory_gb(self, candidates: int) -> float:
        """Peak memory in GiB for a corpus of so many candidates."""
        return self.mem_gb + self.mem_gb_per_million * candidates / 1e6


@dataclass(frozen=True)
class StageNode:
    """One stage of the graph."""

    name: str
    command: str
    meta: StageMeta
    upstream: tuple[str, ...]
    """Stages whose outputs this one reads."""
    outputs: tuple[str, ...]
    """Paths relative to the repository root."""


BUSY = "works now, or was killed a moment ago"
"""Reason of a stage that another process holds."""


class GraphError(ValueError):
    """dvc.yaml does not describe a graph that can be run; one line."""


@contextmanager
def open_repo(root: Path) -> Iterator[Any]:
    """DVC's view of the clone, for one thread at a time; waits for other dvc processes.

    An opening inside another one of the same clone shares it, and with it the state of dvc.yaml,
    dvc.lock and DVC's configuration at the outer one's beginning.

    Raises:
        GraphError: DVC has met a dvc.lock that cannot be read.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with _REPO_LOCK:
        place = root.resolve()
        if place in _OPENED:
            yield _OPENED[place]
            return
        mend_after_kills(root)
        work_without_git(root)
        # Waiting: without it a question fails when another dvc process holds the lock for a moment.
        repo = _OPENED[place] = Repo(str(root), _wait_for_lock=True)
        try:
            yield repo
        except DvcException:
            # Of marks of a merge in dvc.lock DVC says neither the line nor what to do.
            read_lock(root)
            raise
        finally:
            del _OPENED[place]
            repo.close()


def work_without_git(root: Path) -> None:
    """Let DVC work in a folder that no git repository holds: from an archive, an image layer.

    DVC refuses such a folder unless its own configuration says `core.no_scm`, also where a person
    types `dvc repro`; so that is written to `.dvc/config.local`, and said once. Results, resuming
    and reports are the same; there is no commit to record, and sweeps, `reproduce` and clones on
    other machines need one.
    """
    here = root.resolve()
    if any((folder / ".git").exists() for folder in (here, *here.parents)):
        return
    from dvc.config import Config

    config = Config(str(here / ".dvc"), validate=False)
    if config.load_one("local").get("core", {}).get("no_scm"):
        return
    with config.edit("local") as local:
        local.setdefault("core", {})["no_scm"] = True
    print(
        f"{here} is in no git repository: DVC works without one (.dvc/config.local); runs name no "
        "commit",
        file=sys.stderr,
    )


def _meta(name: str, values: Any) -> StageMeta:
    try:
        return StageMeta.model_validate(values or {})
    except ValidationError as problem:
        raise GraphError(f"dvc.yaml: stages.{name}.meta.{first_error(problem)}") from None


def stage_graph(root: Path) -> dict[str, StageNode]:
    """All stages in an order in which they can run.

    Raises:
        GraphError: a stage has no valid `meta`.
    """
    import networkx
    from dvc.stage import PipelineStage

    with open_repo(root) as repo:
        # An edge in DVC's graph points from a stage to what it depends on.
        graph = repo.index.graph
        stages = [stage for stage in graph if isinstance(stage, PipelineStage)]
        needs = networkx.DiGraph()
        needs.add_nodes_from(stage.name for stage in stages)
        for stage in stages:
            for other in graph.successors(stage):
                if isinstance(other, PipelineStage):
                    needs.add_edge(other.name, stage.name)
        by_name = {stage.name: stage for stage in stages}
        # By name among equals: every command lists and runs the stages in the same order.
        order = networkx.lexicographical_topological_sort(needs)
        return {
            name: StageNode(
                name=name,
                command=str(by_name[name].cmd),
                meta=_meta(name, by_name[name].meta),
                upstream=tuple(sorted(needs.predecessors(name))),
                outputs=tuple(sorted(out.def_path for out in by_name[name].outs)),
            )
            for name in order
        }


def load_stage(repo: Any, root: Path, name: str) -> Any:
    """DVC's own object of a stage, from a `Repo` that is open."""
    return repo.stage.load_one(path=str(root / "dvc.yaml"), name=name)


def _unknown(name: str, known: Iterable[str]) -> GraphError:
    return GraphError(f"no stage '{name}' in dvc.yaml; stages: {', '.join(known)}")


def stage_node(root: Path, name: str) -> StageNode:
    """One stage without its place in the graph: no `upstream`, a quarter of the graph's time.

    Raises:
        GraphError: no such stage, or it has no valid `meta`.
    """
    from dvc.stage.exceptions import StageNotFound

    with open_repo(root) as repo:
        try:
            stage = load_stage(repo, root, name)
        except StageNotFound:
            raise _unknown(name, read_stages(root)) from None
        return StageNode(
            name=name,
            command=str(stage.cmd),
            meta=_meta(name, stage.meta),
            upstream=(),
            outputs=tuple(sorted(out.def_path for out in stage.outs)),
        )


def read_stages(root: Path) -> dict[str, Any]:
    """`stages` of dvc.yaml as they stand there."""
    values: dict[str, Any] = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    return dict(values["stages"])


def stages_until(root: Path, name: str | None) -> dict[str, StageNode]:
    """The graph up to one stage: it and everything that it needs; None: all.

    Raises:
        GraphError: no such stage.
    """
    graph = stage_graph(root)
    if name is None:
        return graph
    if name not in graph:
        raise _unknown(name, graph)
    wanted = {name}
    # Backwards through the order: whoever needs a stage has been seen before it.
    for stage in reversed(graph):
        if stage in wanted:
            wanted |= set(graph[stage].upstream)
    return {stage: node for stage, node in graph.items() if stage in wanted}


def dependencies(root: Path, name: str) -> list[str]:
    """Paths that a stage names in dvc.yaml, templates not filled in; empty for an unknown stage."""
    return list(read_stages(root).get(name, {}).get("deps", []))


def is_frozen(root: Path, name: str) -> bool:
    """Whether `frozen: true` has fixed a stage's outputs as they are."""
    return bool(read_stages(root).get(name, {}).get("frozen", False))


def stale_stages(root: Path, graph: dict[str, StageNode]) -> dict[str, str]:
    """Stages that have to be looked at again, each with DVC's reason or the upstream one.

    A stage below a stale one is included: `dvc repro` decides when its inputs are there.
    """
    with open_repo(root) as repo:
        # From outside the repository DVC calls a stage "path/dvc.yaml:name".
        status = _status(repo)
        cache = Path(repo.cache.local.path)
    reasons: dict[str, str] = {}
    locked = read_lock(root)
    code = CodeChanges(root)
    code_differs = CODE in graph and (CODE not in locked or bool(status.get(CODE)))
    frozen = {name for name, stage in read_stages(root).items() if stage.get("frozen")}
    for name, node in graph.items():
        if name not in locked:
            reasons[name] = "never run"
            continue
        changes: list[Any] = status.get(name, [])
        if name == CODE:
            # DVC calls it changed for a comment too.
            changes = changes if changes and not code.written() else []
        elif name not in frozen and (code_differs or _names(changes, code_path(name))):
            # By what the code means now, whatever the file in the workspace says.
            changes = _without(changes, code_path(name))
            changed = code.since(name, locked[name], cache)
            changes = [*changes, *([changed] if changed else [])]
        if name == SOURCE:
            # DVC says of it that it is always changed.
            changes = [change for change in changes if change != ALWAYS_CHANGED]
            changed = "" if changes or name in frozen else source_changes(root, locked[name])
            changes += [changed] if changed else []
        if changes:
            reasons[name] = _reason(changes)
        # The stage `code` runs at nearly every edit; who depends on it is asked by its own file
        # above.
        elif behind := [up for up in node.upstream if up in reasons and up != CODE]:
            reasons[name] = f"after {', '.join(behind)}"
    return reasons


def _status(repo: Any) -> dict[str, list[Any]]:
    """DVC's changes by stage; a stage that some process works on at this moment is one of them.

    DVC refuses to look at such a stage, and with it at all others. Whoever then asks for it waits
    for the stage's own lock (`flows.running.clone_lock.stage_lock`).
    """
    from dvc.lock import LockError

    try:
        found = repo.status()
    except LockError:
        found = {}
        for stage in repo.index.stages:
            try:
                found |= repo.status(targets=[stage.addressing])
            except LockError:
                found[stage.addressing] = [BUSY]
    return {name.rsplit(":", 1)[-1]: changes for name, changes in found.items()}


def changes_beside_code(root: Path, name: str) -> str:
    """What DVC says has changed of a stage, its code left out; empty for nothing."""
    with open_repo(root) as repo:
        status = repo.status(targets=[name])
    changes: list[Any] = next(iter(status.values()), [])
    changes = [change for change in changes if change != ALWAYS_CHANGED]
    return _reason(_without(changes, code_path(name)))


def _names(changes: list[Any], path: str) -> bool:
    """Whether DVC's status of a stage names a dependency."""
    return any(
        isinstance(entries, dict) and path in entries
        for change in changes
        if isinstance(change, dict)
        for entries in change.values()
    )


def _without(changes: list[Any], path: str) -> list[Any]:
    """DVC's status of a stage less what it says of one dependency."""
    kept: list[Any] = []
    for change in changes:
        if isinstance(change, dict):
            change = {
                what: {key: how for key, how in entries.items() if key != path}
                if isinstance(entries, dict)
                else entries
                for what, entries in change.items()
            }
            change = {what: entries for what, entries in change.items() if entries}
        if change:
            kept.append(change)
    return kept


def has_cached_result(root: Path, name: str) -> bool:
    """Whether `dvc repro` would restore a stage's outputs from the cache instead of running it.

    Nothing is written. `dvc repro --dry` cannot be asked: it looks for the dependencies of the
    lock and not for those that are there.
    """
    from dvc.exceptions import DvcException
    from dvc.stage.cache import _can_hash

    with open_repo(root) as repo:
        stage = load_stage(repo, root, name)
        try:
            stage.save_deps()
        except DvcException:
            return False
        # The run cache knows no stage whose outputs persist, such as `source`, and refuses to look.
        if not _can_hash(stage):
            return False
        entry = repo.stage_cache._load(stage) or {}
        folder = Path(repo.cache.local.path)
        made = out_hashes(entry).values()
        # The run cache remembers results whose files `dvc gc` has removed.
        return bool(made) and all(cached_file(folder, md5).is_file() for md5 in made)


def _reason(changes: list[Any]) -> str:
    parts: list[str] = []
    for change in changes:
        if isinstance(change, str):
            parts.append(change)
            continue
        for what, entries in change.items():
            if isinstance(entries, dict):
                named = [f"{path} ({kind})" for path, kind in entries.items()]
                parts.append(f"{what}: {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}")
            else:
                parts.append(f"{what}: {entries}")
    return "; ".join(parts)


def stage_key(root: Path, name: str) -> str:
    """sha256 over command, dependency hashes and parameter values of a stage.

    Equal keys mean that the same command would see the same inputs, so unfinished work under this
    key can be continued.
    """
    return stage_identity(root, name)[0]


def stage_identity(root: Path, name: str) -> tuple[str, dict[str, str]]:
    """The stage's key and what it hashes of files: DVC hash by path of every dependency.

    Raises:
        GraphError: a dependency is not there.
    """
    from dvc.dependency.base import DependencyDoesNotExistError

    inputs: dict[str, str] = {}
    with open_repo(root) as repo:
        stage = load_stage(repo, root, name)
        parts: list[Any] = [stage.cmd]
        for dep in sorted(stage.deps, key=lambda dep: str(dep.def_path)):
            params = getattr(dep, "params", None)
            if params:
                parts.append([dep.def_path, dep.read_params()])
            else:
                try:
                    dep.save()
                except DependencyDoesNotExistError:
                    raise GraphError(
                        f"{name}: {dep.def_path} is missing; `ultraflux run --until {name}` makes "
                        "what the stage stands on"
                    ) from None
                parts.append([dep.def_path, dep.hash_info.value])
                inputs[str(dep.def_path)] = str(dep.hash_info.value)
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest(), inputs


def add(root: Path, folder: str) -> None:
    """`dvc add`: put a folder under version control; unchanged files are not read again.

    Raises:
        ValueError: DVC refuses; one line.
    """
    dvc(root, "add", folder, failure=ValueError)


def cache_folder(root: Path) -> Path:
    """Where this clone's DVC cache keeps files by md5 (shared caches lie elsewhere)."""
    with open_repo(root) as repo:
        return Path(repo.cache.local.path)


def locked_stages(text: str) -> dict[str, Any]:
    """`stages` of a dvc.lock's text; empty for an empty one."""
    stages: dict[str, Any] = (yaml.safe_load(text) or {}).get("stages", {})
    return stages


def lock_entry(root: Path, name: str) -> dict[str, Any] | None:
    """What dvc.lock says of a stage: cmd, deps, params, outs with hashes; None if it never ran."""
    return read_lock(root).get(name)


def read_lock(root: Path) -> dict[str, Any]:
    """`stages` of dvc.lock, empty before the first run.

    Raises:
        GraphError: it is no YAML, such as with the marks of a merge; one line.
    """
    mend_lock(root)
    try:
        return locked_stages((root / "dvc.lock").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise GraphError(
            f"dvc.lock cannot be read{where}; mend it, or take that of the last commit: git "
            "checkout HEAD dvc.lock"
        ) from None
