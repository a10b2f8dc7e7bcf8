"""What `make` does before it does anything."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder with the Makefile, what it reads, and an environment of its own."""
    for name in ("Makefile", "requirements.lock", "requirements-bootstrap.lock", "pyproject.toml"):
        shutil.copy2(root / name, tmp_path / name)
    environment(tmp_path / ".venv", tmp_path / ".venv")
    return tmp_path


def environment(place: Path, made_for: Path) -> None:
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "ultraflux").write_text(f"#!{made_for}/bin/python\nimport sys\n")


def program(place: Path, body: str) -> Path:
    """A shell script that stands for an environment's program."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"#!/bin/bash\n{body}\n")
    place.chmod(0o755)
    return place


COPIES = 'cp -n "$0" .venv/bin/python; cp -n "$0" .venv/bin/uv; true'


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Of a person: a make that a make starts says where it is.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=clone, env=env, capture_output=True, text=True)


def made(clone: Path) -> str:
    """What make would do."""
    done = make(clone, "-n", "setup")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_environment_that_was_made_elsewhere_is_made_anew(clone: Path, tmp_path: Path) -> None:
    assert "made for another folder" not in made(clone)
    assert (clone / ".venv").is_dir()
    moved = clone.rename(tmp_path.with_name("moved"))
    said = made(moved)
    assert "this clone was moved or copied" in said
    assert "-m venv .venv" in said
    # Asked, not done.
    assert (moved / ".venv" / "bin" / "ultraflux").exists()
    (moved / ".venv" / "bin" / "theirs").touch()
    stub = program(moved / "python", f"test $2 != venv || mkdir -p .venv/bin; {COPIES}")
    done = make(moved, "setup", f"PYTHON={stub}")
    assert done.returncode == 0, done.stderr
    assert not (moved / ".venv" / "bin" / "theirs").exists()
    assert "Installing" not in make(moved, "setup", f"PYTHON={stub}").stdout


def test_an_environment_behind_a_link_is_left_alone(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / ".venv")
    elsewhere = tmp_path.with_name("elsewhere")
    environment(elsewhere, Path("/third/place"))
    (clone / ".venv").symlink_to(elsewhere)
    assert "made for another folder" not in made(clone)
    refused = make(clone, "setup")
    assert (refused.returncode, refused.stdout.count("\n")) == (2, 1)
    assert "error: .venv is a link to an environment without" in refused.stdout
    program(elsewhere / "bin" / "python", f"exec {sys.executable} -S -c 'raise SystemExit(0)'")
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
    for target in ("setup", "lint", "clean"):
        done = make(clone, *(["-n"] if target == "lint" else []), target)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pip" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before
    assert (clone / ".venv").is_symlink()


def test_the_code_of_a_clone_is_run_by_an_environment_behind_a_link(
    clone: Path, tmp_path: Path
) -> None:
    shutil.rmtree(clone / ".venv")
    elsewhere = tmp_path.with_name("packages")
    program(elsewhere / "bin" / "python", "true")
    program(elsewhere / "bin" / "ultraflux", "echo $PYTHONPATH")
    (clone / ".venv").symlink_to(elsewhere)
    assert make(clone, "run").stdout.strip().split(":")[0] == str(clone)


@pytest.mark.parametrize(
    "name",
    [
        "a$(touch pwned)b",
        pytest.param("a`touch pwned`b", marks=pytest.mark.slow),
        'it"s',
        pytest.param("it's", marks=pytest.mark.slow),
        "a b",
    ],
)
def test_a_folders_name_is_no_command_and_no_move(clone: Path, name: str) -> None:
    folder = clone.parent / name
    folder.mkdir()
    for path in list(clone.iterdir()):
        path.rename(folder / path.name)
    (folder / ".venv" / "bin" / "ultraflux").write_text(f"#!{folder}/.venv/bin/python\n")
    assert make(folder, "help").returncode == 0
    assert "made for another folder" not in made(folder)
    assert not list(folder.rglob("pwned"))
    assert (folder / ".venv" / "bin" / "ultraflux").is_file()


def test_clean_stops_servers_of_a_moved_clone_and_refuses_where_it_cannot(
    clone: Path, tmp_path: Path
) -> None:
    moved = clone.rename(tmp_path.with_name("moved-with-servers"))
    for name in ("services", "records/sent", "records/unsent"):
        (moved / "runs" / name).mkdir(parents=True)
    for name in ("sent/run.json", "sent/mlflow.json", "unsent/run.json"):
        (moved / "runs" / "records" / name).touch()
    without = make(moved, "clean")
    assert (without.returncode, without.stdout.count("\n")) == (2, 1)
    assert "error: servers of this clone may run" in without.stdout
    program(moved / ".venv" / "bin" / "python", "echo called $@ >> calls; test -e down")
    assert make(moved, "clean").returncode == 2
    (moved / "down").touch()
    for tree in (".", "runs/submitted/abc", "runs/sweep/name/set"):
        held = moved / tree / "runs" / "clone.lock"
        held.parent.mkdir(parents=True, exist_ok=True)
        with held.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            busy = make(moved, "clean")
        said = "error: a run works in this clone: end it first\n"
        assert (busy.returncode, busy.stdout) == (2, said)
    assert (moved / "runs" / "services").is_dir()
    done = make(moved, "clean")
    assert done.returncode == 0, done.stderr
    assert "1 of which MLflow never had" in done.stdout
    assert (moved / "calls").read_text() == "called -m flows.entry down\n" * 2
    assert not (moved / "runs").exists()
    assert not (moved / ".venv").exists()


def test_clean_asks_for_servers_whose_notes_have_gone(clone: Path) -> None:
    program(clone / ".venv" / "bin" / "ultraflux", "false")
    program(clone / ".venv" / "bin" / "python", "echo called $@ >> calls; false")
    done = make(clone, "clean")
    assert done.returncode == 0, done.stderr
    assert (clone / "calls").read_text() == "called -m flows.entry down\n"


def test_an_environment_without_pip_gets_one(clone: Path) -> None:
    """One whose making was ended, or that `uv venv` made."""
    shutil.rmtree(clone / ".venv")
    venv.create(clone / ".venv", with_pip=False)
    python = clone / ".venv" / "bin" / "python"
    asked = [str(python), "-c", "import pip"]
    assert subprocess.run(asked, capture_output=True).returncode == 1
    (line,) = (line for line in made(clone).splitlines() if "ensurepip" in line)
    for _ in range(2):
        subprocess.run(["bash", "-c", line], cwd=clone, check=True, capture_output=True)
        subprocess.run(asked, check=True)
