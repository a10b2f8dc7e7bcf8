"""Checkpoint store: atomicity under SIGKILL, retention, safe loading, random states."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.training.distributed.checkpoint_folders import (
    CONTENTS_FILE,
    LATEST_FILE,
    CheckpointUnreadable,
)
from components.training.distributed.checkpoint_hashes import (
    blames_file,
    file_hashes,
    first_damaged,
)
from components.training.distributed.checkpoints import CheckpointStore, load_state, save_state

FORK = multiprocessing.get_context("fork")


def payload(step: int) -> bytes:
    return (f"{step:06d}" * 5000).encode()


def write_folder(step: int) -> Callable[[Path], None]:
    """Two files, one in a sub-folder, like DeepSpeed's layout."""

    def write(folder: Path) -> None:
        (folder / "global").mkdir()
        (folder / "weights.bin").write_bytes(payload(step))
        (folder / "global" / "optimizer.bin").write_bytes(payload(step + 1))

    return write


def assert_whole(store: CheckpointStore) -> int:
    found = store.latest()
    assert found is not None
    step, folder = found
    assert (folder / "weights.bin").read_bytes() == payload(step)
    assert (folder / "global" / "optimizer.bin").read_bytes() == payload(step + 1)
    return step


def save_for_ever(folder: Path, keep: int) -> None:
    store = CheckpointStore(folder, keep)
    found = store.latest()
    step = found[0] if found else 0
    while True:
        step += 1
        store.save(step, write_folder(step))


def save_and_die_at_call(folder: Path, step: int, fatal_call: int) -> None:
    """Save once, but SIGKILL this process just before its n-th change of the file system."""
    calls = 0

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return original(*args, **kwargs)

        return wrapped

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    CheckpointStore(folder, keep=1).save(step, write_folder(step))


@pytest.mark.parametrize("keep", [1, 3])
def test_sigkill_at_random_times_leaves_a_whole_checkpoint(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep)
    store.save(1, write_folder(1))
    clock = random.Random(keep)
    reached = 1
    kills = 0
    while kills < 15 or reached == 1:
        child = FORK.Process(target=save_for_ever, args=(tmp_path, keep))
        child.start()
        # On a busy machine a child may need longer for its first save.
        time.sleep(clock.uniform(0.005, 0.08) * max(1, kills - 14))
        kills += 1
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        step = assert_whole(store)
        assert step >= reached
        reached = step
    assert reached > 1


def test_sigkill_before_any_single_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    died_at: list[int] = []
    for fatal_call in range(200):
        folder = tmp_path / str(fatal_call)
        store = CheckpointStore(folder, keep=1)
        store.save(1, write_folder(1))
        child = FORK.Process(target=save_and_die_at_call, args=(folder, 2, fatal_call))
        child.start()
        child.join()
        assert assert_whole(store) in (1, 2)
        store.save(3, write_folder(3))
        assert assert_whole(store) == 3
        assert sorted(p.name for p in folder.iterdir()) == [LATEST_FILE, "step-00000003"]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        died_at.append(fatal_call)
    assert len(died_at) > 15


def test_a_checkpoint_has_its_name_and_the_pointer_only_when_all_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kill does not lose what only the kernel holds, a power cut does.
    store = CheckpointStore(tmp_path, keep=1)
    on_disk: dict[str, int] = {}
    fsync, rename, replace = os.fsync, os.rename, os.replace
    renamed: list[str] = []

    def noted_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        on_disk[path.relative_to(tmp_path).as_posix()] = path.stat().st_size
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        expected = [source, *source.rglob("*")]
        assert {path.relative_to(tmp_path).as_posix() for path in expected} <= on_disk.keys()
        for path in expected:
            if path.is_file():
                assert on_disk[path.relative_to(tmp_path).as_posix()] == path.stat().st_size
        on_disk.clear()
        renamed.append(target.name)
        rename(source, target)

    def noted_replace(source: Path, target: Path) -> None:
        # The folder, which holds the new name, and the pointer's own text.
        assert on_disk.keys() >= {".", source.name}
        on_disk.clear()
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.save(1, write_folder(1))
    assert renamed == ["step-00000001", LATEST_FILE]
    assert on_disk.keys() == {"."}


def test_an_empty_folder_has_no_latest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "new", keep=2).latest() is None


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (0, 10, 20, 30):
        store.save(step, write_folder(step))
    assert store.steps() == [20, 30]
    assert assert_whole(store) == 30


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(5, lambda folder: (folder / "a").write_text("old"))
    store.save(5, lambda folder: (folder / "a").write_text("new"))
    found = store.latest()
    assert found is not None
    assert (found[1] / "a").read_text() == "new"
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_steps_after_the_one_just_saved_are_dropped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        store.save(step, write_folder(step))
    (tmp_path / LATEST_FILE).write_text("step-00000010\n")
    store.save(15, write_folder(15))
    assert store.steps() == [10, 15]
    assert assert_whole(store) == 15


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["weights.bin", "global/optimizer.bin"])
def test_a_checkpoint_with_another_bit_is_rejected_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, place: float
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, write_folder(1))
    newest = store.save(2, write_folder(2))
    flipped(newest / name, place)
    # Listing goes by sizes.
    assert store.latest() == (2, newest)
    assert store.latest_intact() == (1, tmp_path / "step-00000001")
    line = f"{newest / name}: damaged, it does not hold what was written; going on from step 1\n"
    assert capsys.readouterr().err == line
    assert assert_whole(store) == 1
    store.save(2, write_folder(2))
    assert store.latest_intact() == (2, tmp_path / "step-00000002.1")
    assert capsys.readouterr().err == ""


def read_without_descriptors(read: Callable[[], object]) -> None:
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
    # The lowest free one is what a file would get.
    while True:
        try:
            os.dup(0)
        except OSError:
            break
    try:
        read()
    except CheckpointUnreadable:
        os._exit(1)
    except OSError as problem:
        os._exit(0 if problem.errno == errno.EMFILE else 2)
    os._exit(3)


def test_what_a_process_lacks_is_no_damage_of_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    save_state(file, {"w": torch.ones(4)})
    known = file_hashes(tmp_path, [file.name])
    for read in (
        partial(first_damaged, tmp_path, dict(known)),
        partial(first_damaged, tmp_path, {file.name: None}),
        partial(load_state, file),
    ):
        child = FORK.Process(target=read_without_descriptors, args=(read,))
        child.start()
        child.join()
        assert child.exitcode == 0
    for said in (MemoryError(), RuntimeError("can't allocate: (Cannot allocate memory)")):
        assert not blames_file(said)
    assert blames_file(OSError(errno.EIO, "Input/output error"))


@pytest.mark.parametrize("damage", ["json", "tensor", "first byte", None])
def test_a_checkpoint_of_before_there_were_hashes_speaks_for_itself(
    tmp_path: Path, damage: str | None
) -> None:
    store = CheckpointStore(tmp_path, keep=3)

    def write(folder: Path) -> None:
        save_state(folder / "state.pt", {"w": torch.ones(4096)})
        (folder / "trainer.json").write_text('{"plan": {}}')

    for step in (1, 2):
        contents = store.save(step, write) / CONTENTS_FILE
        kept = json.loads(contents.read_text())
        del kept["xxh64"]
        contents.write_text(json.dumps(kept))
    newest = tmp_path / "step-00000002"
    if damage == "json":
        flipped(newest / "trainer.json", 0.0)
    elif damage is not None:
        flipped(newest / "state.pt", 0.5 if damage == "tensor" else 0.0)
    found = store.latest_intact()
    assert found is not None
    assert found[0] == (2 if damage is None else 1)


def test_ranks_agree_about_a_checkpoint_of_which_one_found_the_damage(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=20)
    flags, found = [False, False], {}
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, write_folder(1))
    flipped(store.save(2, write_folder(2)) / "weights.bin", 0.5)

    def resume(rank: int) -> None:
        def on_any_rank(flag: bool) -> bool:
            flags[rank] = flag
            barrier.wait()
            answer = any(flags)
            barrier.wait()
            return answer

        mine = CheckpointStore(
            tmp_path,
            keep=3,
            rank=rank,
            world_size=2,
            barrier=barrier.wait,
            on_any_rank=on_any_rank,
        )
        found[rank] = mine.latest_intact()

    threads = [threading.Thread(target=resume, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == (1, tmp_path / "step-00000001")


def test_a_failing_writer_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, write_folder(1))

    def disk_full(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.save(2, disk_full)
    assert assert_whole(store) == 1
    store.save(2, write_folder(2))
    assert assert_whole(store) == 2


def test_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=20)

    def save(rank: int) -> None:
        store = CheckpointStore(tmp_path, keep=1, rank=rank, world_size=2, barrier=barrier.wait)
        for step in (1, 2):
            store.save(step, lambda folder, s=step: (folder / f"rank{rank}").write_text(str(s)))

    tmp_path.mkdir(exist_ok=True)
    threads = [threading.Thread(target=save, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = CheckpointStore(tmp_path, keep=1).latest()
    assert found is not None
    assert found[0] == 2
    assert [(found[1] / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.parametrize(("keep", "step"), [(0, 1), (1, -1)])
def test_impossible_arguments_are_refused(tmp_path: Path, keep: int, step: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        CheckpointStore(tmp_path, keep).save(step, write_folder(step))


def test_a_state_round_trips_through_a_file(tmp_path: Path) -> None:
    state = {"w": torch.arange(5.0), "step": 3, "name": "vae", "nested": [1.5, {"t": None}]}
    save_state(tmp_path / "s.pt", state)
    loaded = load_state(tmp_path / "s.pt")
    assert torch.equal(loaded["w"], state["w"])
    assert {k: loaded[k] for k in ("step", "name", "nested")} == {
        k: state[k] for k in ("step", "name", "nested")
    }


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"f": os.system}, protocol=2))
    with pytest.raises(CheckpointUnreadable, match=r"evil\.pt"):
        load_state(tmp_path / "evil.pt")


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_exactly_the_newest_stay(tmp_path: Path, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep)
    for step in range(1, 8):
        store.save(step, lambda folder: (folder / "weights").write_bytes(b"w"))
        assert store.steps() == list(range(max(1, step - keep + 1), step + 1))
