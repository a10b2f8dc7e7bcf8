"""What of a clone counts as its code and settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flows.records.provenance import changes_digest, changes_since_commit


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clean clone whose photographs are to lie in `photos`."""
    (tmp_path / "params.yaml").write_text("ingest: {source: photos}\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "photos").mkdir()
    return tmp_path


def test_photographs_are_data_and_no_change_of_the_code(project: Path) -> None:
    (project / "photos" / "a.jpg").write_bytes(b"a photograph")
    assert changes_digest(project) == ""
    # Captions are a person's work: a run is repeated with them.
    (project / "photos" / "captions.jsonl").write_text("{}\n")
    with_captions = changes_digest(project)
    assert with_captions != ""
    assert b"captions.jsonl" in changes_since_commit(project)
    (project / "elsewhere.jpg").write_bytes(b"a photograph")
    assert changes_digest(project) not in {"", with_captions}


def test_settings_that_cannot_be_read_hide_nothing(project: Path) -> None:
    (project / "photos" / "a.jpg").write_bytes(b"a photograph")
    (project / "params.yaml").write_text("ingest: [")
    unreadable = changes_digest(project)
    (project / "photos" / "a.jpg").write_bytes(b"another")
    assert changes_digest(project) not in {"", unreadable}


@pytest.mark.parametrize("name", [b"caf\xe9.py", b" begins with a space.py"])
def test_names_may_be_any_bytes(project: Path, name: bytes) -> None:
    path = os.fsencode(project) + b"/" + name
    Path(os.fsdecode(path)).write_text("one = 1\n")
    first = changes_digest(project)
    assert b"one = 1" in changes_since_commit(project)
    Path(os.fsdecode(path)).write_text("two = 2\n")
    assert changes_digest(project) not in {"", first}
