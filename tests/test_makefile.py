"""What `make` does before it does anything."""

from __future__ import annotations

import shutil
import subprocess
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


def made(clone: Path) -> str:
    """What make would do."""
    command = ["make", "-n", "setup"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout


def test_an_environment_that_was_made_elsewhere_is_made_anew(clone: Path, tmp_path: Path) -> None:
    assert "made for another folder" not in made(clone)
    assert (clone / ".venv").is_dir()
    moved = clone.rename(tmp_path.with_name("moved"))
    said = made(moved)
    assert "this clone was moved or copied" in said
    assert "-m venv .venv" in said
    assert not (moved / ".venv").exists()


def test_an_environment_behind_a_link_is_left_alone(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / ".venv")
    elsewhere = tmp_path.with_name("elsewhere")
    environment(elsewhere, Path("/third/place"))
    (clone / ".venv").symlink_to(elsewhere)
    assert "made for another folder" not in made(clone)
    assert (elsewhere / "bin" / "ultraflux").is_file()


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
