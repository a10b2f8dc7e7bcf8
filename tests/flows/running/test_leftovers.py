"""What can go below runs/ is listed with its size, what is used or unfinished is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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


def cleaned(project: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`ultraflux clean --runs`, and the commit that a run would name."""
    code = (
        "from flows import cli; from flows.records.provenance import provenance_tags; "
        "import atexit, pathlib, sys; "
        "atexit.register(lambda: print(provenance_tags(pathlib.Path())['mlflow.source.git.commit'],"
        " file=sys.stderr)); cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "clean", "--runs", *options],
        cwd=project,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def test_in_a_hook_of_another_repository_its_trees_and_its_commit_stay_its_own(
    toy: Path, tmp_path: Path
) -> None:
    def said(folder: Path, *words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    other = tmp_path / "other"
    other.mkdir()
    said(other, "init", "-q")
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    said(other, *who, "commit", "-q", "--allow-empty", "-m", "theirs")
    said(other, "worktree", "add", "-q", "--detach", str(tmp_path / "on-a-stick"))
    # A disk that is not there now; Git would forget the tree at the next `prune`.
    (tmp_path / "on-a-stick").rename(tmp_path / "away")
    submitted(toy, "aaaa")
    place = other / ".git"
    env = {"GIT_DIR": place, "GIT_COMMON_DIR": place, "GIT_INDEX_FILE": place / "index"}
    done = cleaned(toy, **{name: str(path) for name, path in env.items()}, GIT_WORK_TREE=str(other))
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == [said(toy, "rev-parse", "HEAD")]
    assert "on-a-stick" in said(other, "worktree", "list")
    assert "aaaa" not in said(toy, "worktree", "list")


@pytest.mark.usefixtures("tree_on_a_stick")
def test_git_forgets_the_trees_that_go_and_no_other(toy: Path) -> None:
    begun = submitted(toy, "aaaa")
    subprocess.run(["git", "worktree", "lock", str(begun)], cwd=toy, check=True)
    (begun / ".git").unlink()
    for one in leftovers(toy):
        assert remove(toy, one)
    listed = ["git", "worktree", "list"]
    assert "aaaa" not in subprocess.run(listed, cwd=toy, capture_output=True, text=True).stdout


def test_a_link_goes_without_what_it_leads_to(toy: Path, tmp_path: Path) -> None:
    big, linked = tmp_path / "big", toy / "runs" / "vae_tiles" / "linked"
    big.mkdir()
    (big / "kept").write_text("kept")
    linked.parent.mkdir(parents=True)
    linked.symlink_to(big)
    done = cleaned(toy)
    assert done.returncode == 0, done.stderr
    assert "1 removed" in done.stdout
    assert not linked.is_symlink()
    assert (big / "kept").is_file()


def test_what_cannot_be_removed_is_named(toy: Path, hold: Callable[[Path], None]) -> None:
    tile = toy / "runs" / "vae_tiles" / "cccc"
    tile.mkdir(parents=True)
    (tile / "shard.bin").write_bytes(b"tile")
    (tile.parent / "dddd").mkdir()
    hold(tile)
    done = cleaned(toy)
    listed = cleaned(toy, "--json")
    assert done.returncode == listed.returncode == 1
    assert "error: runs/vae_tiles/cccc could not be removed" in done.stderr
    assert "1 removed" in done.stdout
    assert [(one["path"], one["removed"]) for one in json.loads(listed.stdout)] == [
        ("runs/vae_tiles/cccc", False)
    ]
