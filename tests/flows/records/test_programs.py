"""Git as a program: names of any bytes, and one line of why a command failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.records.programs import ProgramFailed, git, git_answer


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    return tmp_path


def test_names_of_any_bytes_are_themselves_in_lists_and_quoted_in_texts(repository: Path) -> None:
    git(repository, "config", "core.quotePath", "false")
    path = Path(os.fsdecode(os.fsencode(repository) + b"/caf\xe9"))
    path.touch()
    listed = git(repository, "ls-files", "-z", "--others").split("\0")
    assert (repository / listed[0]).is_file()
    assert git(repository, "status", "--porcelain") == r'?? "caf\351"'


def test_a_failed_command_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProgramFailed, match=r"^git rev-parse: fatal: [^\n]+$"):
        git(tmp_path, "rev-parse", "HEAD")
    with pytest.raises(LookupError, match=r"^git rev-parse: fatal: "):
        git(tmp_path, "rev-parse", "HEAD", failure=LookupError)
    assert git_answer(tmp_path, "rev-parse", "HEAD") is None
