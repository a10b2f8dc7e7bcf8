"""The DVC remote of a clone: named by the environment, refused in one line, freed safely."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.remote import data_remote


def repro(root: Path) -> None:
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://key:secret@bucket/path", "credentials"),
        ("some/folder", "absolute"),
        ("/no/such/share", "no folder here"),
        ("s3://key:secret@[bad", "no address"),
    ],
)
def test_a_remote_that_cannot_be_used_is_one_line_without_secrets(
    toy: Path, monkeypatch: pytest.MonkeyPatch, url: str, says: str
) -> None:
    monkeypatch.setenv(data_remote.REMOTE, url)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "remote"], cwd=toy, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_a_patience_that_is_no_time_is_one_line(
    toy: Path, share: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(data_remote.PATIENCE, given)
    with pytest.raises(data_remote.RemoteFailed, match=f"{data_remote.PATIENCE}={given}: give a"):
        data_remote.patiently(toy, "dvc pull", lambda repo: None)


def test_without_any_remote_the_line_says_how_to_name_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(data_remote.REMOTE, raising=False)
    with pytest.raises(data_remote.RemoteFailed, match="set ULTRAFLUX_DVC_REMOTE"):
        data_remote.configure(toy)


def test_the_remote_of_the_environment_serves_dvc_by_hand_and_stays_out_of_git(
    toy: Path, share: Path
) -> None:
    assert data_remote.configure(toy) == str(share)
    repro(toy)
    subprocess.run(["dvc", "push", "-q"], cwd=toy, check=True)
    assert [file for file in share.rglob("*") if file.is_file()]
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=toy, capture_output=True, text=True, check=True
    )
    assert changed.stdout == "?? dvc.lock\n"


@pytest.mark.slow
def test_a_cache_freed_of_what_the_remote_has_comes_back(toy: Path, share: Path) -> None:
    data_remote.configure(toy)
    repro(toy)
    subprocess.run(["dvc", "push", "-q"], cwd=toy, check=True)
    (toy / "params.yaml").write_text("project: {name: toy}\nvalue: 2\n")
    repro(toy)
    contents = {path.name: path.read_bytes() for path in (toy / "data").iterdir()}
    cache = toy / ".dvc" / "cache" / "files"
    # Not pushed yet: what the workspace uses stays.
    subprocess.run(["dvc", "gc", "-q", "-f", "-w", "--not-in-remote"], cwd=toy, check=True)
    assert len([file for file in cache.rglob("*") if file.is_file()]) == len(set(contents.values()))
    subprocess.run(["dvc", "push", "-q"], cwd=toy, check=True)
    subprocess.run(["dvc", "gc", "-q", "-f", "-w", "--not-in-remote"], cwd=toy, check=True)
    assert not [file for file in cache.rglob("*") if file.is_file()]
    shutil.rmtree(toy / "data")
    (toy / "data").mkdir()
    subprocess.run(["dvc", "pull", "-q"], cwd=toy, check=True)
    assert {path.name: path.read_bytes() for path in (toy / "data").iterdir()} == contents
    # The remote keeps what a lock uses, the old results go.
    before = len([file for file in share.rglob("*") if file.is_file()])
    subprocess.run(["dvc", "gc", "-q", "-f", "-w", "--cloud"], cwd=toy, check=True)
    assert len([file for file in share.rglob("*") if file.is_file()]) < before
    shutil.rmtree(toy / ".dvc" / "cache")
    shutil.rmtree(toy / "data")
    (toy / "data").mkdir()
    subprocess.run(["dvc", "pull", "-q"], cwd=toy, check=True)
    assert {path.name: path.read_bytes() for path in (toy / "data").iterdir()} == contents
