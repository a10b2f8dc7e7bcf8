"""What lies below `runs/` that nothing needs any more: listed with sizes, removed on request."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.files.holder_locks import try_lock
from components.training.distributed.run_states import (
    fragments,
    lost_states,
    read_states,
    remove_state,
    unneeded,
)
from flows.environment import COMPILED
from flows.records.trees import REPRODUCE, SUBMITTED, trees_of
from flows.running.clone_lock import LOCK_FILE, STAGE_LOCKS, tree_lock_file
from flows.running.dvc_repro import ATTEMPTS
from flows.versioning import graph as versioning
from flows.versioning.torn_files import TORN_LOCK

OLD_LOG_S = 30 * 86400.0
TILES = "runs/vae_tiles"
_TREES = {SUBMITTED: "submitted tree", REPRODUCE: "reproduction"}
"""What goes once no run works there: a sweep and an ablation are compared as a whole."""


@dataclass(frozen=True)
class Leftover:
    """One folder or file that can go."""

    path: str
    """Relative to the clone."""
    kind: str
    reason: str
    size_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def leftovers(root: Path) -> list[Leftover]:
    """What can go, the largest first.

    Kept are: what a run uses now, unfinished training that nobody went on from, journals of stages
    that have not ended, records, databases of the servers, and everything that DVC tracks.
    """
    found = [
        *(*_working_trees(root), *_states(root), *_tiles(root), *_logs(root)),
        *_killed(root),
        *_compiled(root),
    ]
    return sorted(found, key=lambda one: (-one.size_bytes, one.path))


def remove(root: Path, one: Leftover) -> bool:
    """Remove what `leftovers` listed; Git forgets a working tree with it.

    Returns:
        Whether it has gone.
    """
    path = root / one.path
    if one.kind == "training state":
        states = {state.folder: state for state in read_states(path.parent)}
        try:
            if path in states:
                remove_state(states[path])
        except OSError:
            return False
    elif one.kind in _TREES.values():
        _take_away(path)
        if not os.path.lexists(path):
            # Twice: one that Git was making when it was killed is locked for ever. Not `prune`: a
            # person's own tree may be on a disk that is not there now.
            forget = ["git", "worktree", "remove", "--force", "--force", str(path)]
            subprocess.run(forget, cwd=root, capture_output=True)
        tree_lock_file(path).unlink(missing_ok=True)
    else:
        _take_away(path)
    return not os.path.lexists(path)


def _take_away(path: Path) -> None:
    """As far as the system allows; of a link, itself and nothing of what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _size(path: Path) -> int:
    """Bytes on disk that only this path holds: DVC's links into its cache cost nothing."""
    if path.is_symlink():
        return 0
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    total = 0
    for file in files:
        if not file.is_symlink() and (status := file.stat()).st_nlink == 1:
            total += status.st_blocks * 512
    return total


def _in_use(tree: Path) -> bool:
    """Whether a run holds the clone's lock of a working tree, or a worker that of a stage.

    Or somebody who sets the tree up and compares what comes out (`tree_lock`).
    """
    locks = [tree / LOCK_FILE, tree_lock_file(tree), *(tree / STAGE_LOCKS).glob("*")]
    return any(_is_held(path) for path in locks)


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def _working_trees(root: Path) -> Iterator[Leftover]:
    """Of submissions and reproductions: results are in DVC's cache, their runs in MLflow."""
    for kind, title in _TREES.items():
        for tree in trees_of(root, kind):
            unfinished = any(
                not state.finished
                for stage in versioning.stage_graph(root)
                for folder in [tree / "runs" / stage]
                for state in (*read_states(folder), *lost_states(folder))
            )
            if tree.is_dir() and not _in_use(tree) and not unfinished:
                place = str(tree.relative_to(root))
                yield Leftover(place, title, "no run works there", _size(tree))


def _states(root: Path) -> Iterator[Leftover]:
    from flows.running.training_state import present_identity

    for name, node in versioning.stage_graph(root).items():
        if not node.meta.trains:
            continue
        current = present_identity(root, name)
        key = None if current is None else current.key
        for state, reason in unneeded(read_states(root / "runs" / name), key):
            place = str(state.folder.relative_to(root))
            yield Leftover(place, "training state", reason, state.size_bytes())
        if not _in_use(root):
            for folder in fragments(root / "runs" / name):
                place = str(folder.relative_to(root))
                yield Leftover(place, "killed run", "part of a training state", _size(folder))


def _tiles(root: Path) -> Iterator[Leftover]:
    """Tiles of the VAE: cut anew in minutes, and needed while it trains alone."""
    folders = sorted(path for path in (root / TILES).glob("*") if path.is_dir())
    training = any(not state.finished for state in read_states(root / "runs" / "vae"))
    if not training and not _in_use(root):
        for folder in folders:
            place = str(folder.relative_to(root))
            yield Leftover(place, "tiles", "the autoencoder is not being trained", _size(folder))


def _killed(root: Path) -> Iterator[Leftover]:
    """What runs keep for as long as they work, and could not remove when they were killed."""
    if _in_use(root):
        return
    for pattern in (f"{ATTEMPTS}/*", "runs/progress/*", TORN_LOCK):
        for path in sorted(root.glob(pattern)):
            place = str(path.relative_to(root))
            yield Leftover(place, "killed run", "no run works here", _size(path))


def _compiled(root: Path) -> Iterator[Leftover]:
    """Kernels of torch's compiler: made again, in minutes, where they are wanted."""
    folder = root / COMPILED
    if not _in_use(root) and any(path.is_file() for path in folder.rglob("*")):
        yield Leftover(COMPILED, "compiled kernels", "no run works here", _size(folder))


def _logs(root: Path) -> Iterator[Leftover]:
    for log in sorted((root / "runs" / "logs").glob("*.log")):
        age_s = time.time() - log.stat().st_mtime
        if age_s > OLD_LOG_S:
            place = str(log.relative_to(root))
            yield Leftover(place, "log", f"{age_s / 86400:.0f} days old", _size(log))
