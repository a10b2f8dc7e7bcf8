"""Locks of files, asked by other processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.files.holder_locks import (
    claim_first,
    folder_alone,
    held_alone,
    lock_when_free,
    try_lock,
)

ASKS = "from components.files.holder_locks import *; from pathlib import Path; import sys; "


def in_another_process(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASKS + code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_lock_is_held_as_long_as_its_file_is_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    asks = "print(try_lock(Path(sys.argv[1]).open('a')))"
    with path.open("w") as file:
        assert try_lock(file)
        assert in_another_process(asks, path) == "False"
    assert in_another_process(asks, path) == "True"


def test_a_wait_ends_with_the_lock_or_when_it_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as held, path.open("a") as asking:
        assert try_lock(held)
        asked = itertools.count(1)
        assert not lock_when_free(asking, lambda: next(asked) == 3, poll_s=0.01)
        assert next(asked) == 4
        holder = subprocess.Popen(
            [sys.executable, "-c", ASKS + "lock_when_free(Path(sys.argv[1]).open('a'), bool)", path]
        )
        time.sleep(0.3)
        assert holder.poll() is None
        held.close()
        assert holder.wait(30) == 0


def test_what_a_process_claims_is_free_after_its_end(tmp_path: Path) -> None:
    files = [tmp_path / "slots" / name for name in ("a", "b")]
    claims = "print(claim_first([Path(name) for name in sys.argv[1:]]))"
    assert claim_first(files) == files[0]
    assert in_another_process(claims, *files) == str(files[1])
    assert claim_first(files) == files[1]
    assert in_another_process(claims, *files) == "None"


def test_a_refusal_names_the_folder_or_the_holder(tmp_path: Path) -> None:
    with folder_alone(tmp_path, "busy"):
        with pytest.raises(ValueError, match=f"{tmp_path}: busy"), folder_alone(tmp_path, "busy"):
            raise AssertionError
        assert list(tmp_path.iterdir()) == []
    with folder_alone(tmp_path, "busy"), held_alone(tmp_path / "lock", "mine", ValueError):
        with (
            pytest.raises(ValueError, match="mine"),
            held_alone(tmp_path / "lock", "yours", ValueError),
        ):
            raise AssertionError
        assert (tmp_path / "lock").read_text() == "mine\n"
