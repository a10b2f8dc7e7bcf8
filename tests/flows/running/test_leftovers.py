"""What can go below runs/ is listed with its size, what is used or unfinished is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from flows import environment
from flows.running.clone_lock import clone_lock
from flows.running.leftovers import leftovers, remove


def submitted(toy: Path, name: str, folder: str = "submitted") -> Path:
    """A working tree as `ultraflux submit -S` makes it, with 64 KiB of its own."""
    tree = toy / "runs" / folder / name
    command = ["git", "worktree", "add", "-q", "--detach", str(tree), "HEAD"]
    subprocess.run(command, cwd=toy, check=True)
    (tree / "data").mkdir(exist_ok=True)
    (tree / "data" / "own").write_bytes(os.urandom(65536))
    shared = toy / "data" / "shared"
    shared.write_bytes(os.urandom(2**20))
    os.link(shared, tree / "data" / "linked")
    return tree


def test_trees_and_old_logs_can_go_and_what_is_used_stays(toy: Path) -> None:
    free, used = submitted(toy, "aaaa"), submitted(toy, "bbbb")
    logs = toy / "runs" / "logs"
    logs.mkdir(parents=True)
    for name, age_days in (("old.log", 40), ("new.log", 1)):
        (logs / name).write_text("line\n" * 2000)
        changed = time.time() - age_days * 86400
        os.utime(logs / name, (changed, changed))
    tiles = toy / "runs" / "vae_tiles" / "cccc"
    tiles.mkdir(parents=True)
    (tiles / "shard.bin").write_bytes(os.urandom(8192))
    with clone_lock(used, print):
        found = leftovers(toy)
        assert [(one.path, one.kind) for one in found] == [
            ("runs/submitted/aaaa", "submitted tree"),
            ("runs/logs/old.log", "log"),
            ("runs/vae_tiles/cccc", "tiles"),
        ]
    tree, log, tile = (one.size_bytes for one in found)
    # Nothing for what the clone and the tree share.
    assert 65536 <= tree < 65536 + 131072
    assert 8192 <= tile <= log < 16384 + 4096
    with clone_lock(toy, print):
        # A run may be cutting them now.
        assert "tiles" not in {one.kind for one in leftovers(toy)}
    for one in found:
        remove(toy, one)
    assert not free.exists()
    assert used.is_dir()
    assert (logs / "new.log").is_file()
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=toy, capture_output=True, text=True, check=True
    ).stdout
    assert "aaaa" not in listed
    assert "bbbb" in listed
    assert [one.path for one in leftovers(toy)] == ["runs/submitted/bbbb"]


def test_trees_of_reproductions_can_go_also_where_git_was_killed_as_it_made_them(
    toy: Path,
) -> None:
    made, half, used = (submitted(toy, name, "reproduce") for name in ("made", "half", "used"))
    lock = ["git", "worktree", "lock", "--reason", "initializing", str(half)]
    subprocess.run(lock, cwd=toy, check=True)
    with clone_lock(used, print):
        found = leftovers(toy)
    assert {(one.path, one.kind) for one in found} == {
        ("runs/reproduce/made", "reproduction"),
        ("runs/reproduce/half", "reproduction"),
    }
    for one in found:
        remove(toy, one)
    assert not made.exists()
    # Its place is free again.
    submitted(toy, "half", "reproduce")
    assert used.is_dir()


def test_compiled_kernels_of_stages_stay_in_the_clone_and_are_listed(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # Restored afterwards, with whatever `prepare` sets.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    environment.prepare(root=toy)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(toy / "runs" / "compiled")
    folder = Path(cache_dir())
    assert leftovers(toy) == []
    (folder / "kernel.so").write_bytes(os.urandom(8192))
    with clone_lock(toy, print):
        assert leftovers(toy) == []
    (one,) = leftovers(toy)
    assert (one.path, one.kind) == ("runs/compiled", "compiled kernels")
    assert one.size_bytes >= 8192
    remove(toy, one)
    assert not folder.exists()


def test_what_a_kill_left_of_a_training_state_is_listed_and_goes(root: Path, toy: Path) -> None:
    # Whose state it would be, settings say.
    shutil.copyfile(root / "params.yaml", toy / "params.yaml")
    graph = toy / "dvc.yaml"
    graph.write_text(graph.read_text().replace("resumable: false", "resumable: true, trains: true"))
    states = toy / "runs" / "b"
    for name in (".continuing-0123456789abcdef", ".removing-0123456789abcdef", "fedcba9876543210"):
        (states / name / "ranks").mkdir(parents=True)
        (states / name / "ranks" / "torchrun.log").write_bytes(os.urandom(4096))
    with clone_lock(toy, print):
        # It may be filling one now.
        assert leftovers(toy) == []
    found = leftovers(toy)
    assert {(one.kind, one.reason) for one in found} == {("killed run", "part of a training state")}
    assert sorted(one.path for one in found) == [
        "runs/b/.continuing-0123456789abcdef",
        "runs/b/.removing-0123456789abcdef",
        "runs/b/fedcba9876543210",
    ]
    for one in found:
        remove(toy, one)
    assert list(states.iterdir()) == []
