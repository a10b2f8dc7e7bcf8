"""Which errors end a command in one line: forbidden paths, and paths that were typed."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from components.files.whole_files import NotRegularFile, write_text
from flows.commands.command_line import fail
from flows.commands.refusals import BAD_INPUT, FAILED, refusal


def failed(number: int, name: str | None, second: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name, None, second)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "name", "said"),
    [
        (["a", "--html", "no/page.html"], "no", "no/page.html: No such file or directory (no)"),
        (["a", "--html=no/page.html"], "no", "no/page.html: No such file or directory (no)"),
        (["a", "page.html"], "page.html", "page.html: No such file or directory"),
        (
            ["a", "page.html"],
            ".page.html.partial",
            "page.html: No such file or directory (.page.html.partial)",
        ),
        (["a", "out"], "out/deep/x", "out: No such file or directory (out/deep/x)"),
        (["a", "no/page.html"], None, None),
        # Of files that nobody named it is our fault that they are missing.
        (["a", "page.html"], "data/manifest.parquet", None),
        (["a", "."], "data/manifest.parquet", None),
        (["a", ".."], "data/manifest.parquet", None),
        (["stage", "run", "vae"], ".", None),
        (["a", "page.html"], ".other.html.partial", None),
    ],
)
def test_only_a_path_that_was_typed_may_be_missing(
    here: Path, words: list[str], name: str | None, said: str | None
) -> None:
    expected = None if said is None else (said, BAD_INPUT)
    assert refusal(failed(errno.ENOENT, name), words) == expected


def test_a_link_that_leads_nowhere_is_not_said_to_exist(here: Path) -> None:
    os.symlink("loop", "loop")
    with pytest.raises(FileExistsError) as found:
        Path("loop").mkdir(exist_ok=True)
    assert refusal(found.value, ["generate", "--output", "loop"]) == (
        "loop: a link that leads nowhere",
        BAD_INPUT,
    )


def test_a_pipe_in_the_place_of_a_file_is_one_line(here: Path) -> None:
    os.mkfifo("pipe")
    with pytest.raises(NotRegularFile) as found:
        write_text(Path("pipe"), "page")
    assert refusal(found.value, ["history", "--html", "pipe"]) == (
        "pipe: not a regular file",
        BAD_INPUT,
    )


def test_either_name_of_a_rename_counts(here: Path) -> None:
    problem = failed(errno.EISDIR, "/elsewhere/.x.partial", str(here / "x"))
    assert refusal(problem, ["a", "x"]) == ("x: Is a directory (/elsewhere/.x.partial)", BAD_INPUT)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_forbidden_path_is_one_line_whoever_named_it(here: Path, number: int) -> None:
    said = refusal(failed(number, "data/manifest.parquet"), ["a"])
    assert said == (f"data/manifest.parquet: {os.strerror(number)}", BAD_INPUT)


def test_what_is_no_path_keeps_its_trace(here: Path) -> None:
    assert refusal(ConnectionResetError(errno.ECONNRESET, "reset"), ["a", "x"]) is None
    assert refusal(failed(errno.EMFILE, "x"), ["a", "x"]) is None
    assert refusal(ValueError("x"), ["a", "x"]) is None


def test_a_full_disk_is_said_to_be_one(here: Path) -> None:
    outside_python = SafetensorError("Error while serializing: I/O error: full (os error 28)")
    for problem in (failed(errno.ENOSPC, "x"), outside_python):
        said, code = refusal(problem, ["a", "x"]) or ("", 0)
        assert "make room on the disk" in said
        assert code == FAILED
    assert refusal(SafetensorError("invalid header (os error 5)"), ["a", "x"]) is None


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (str(failed(errno.ENOENT, "/a b/c")), "/a b/c: No such file or directory"),
        (str(failed(errno.EXDEV, "x", "y")), "x: Invalid cross-device link"),
        (f"weights: {failed(errno.EACCES, 'x')}", "weights: x: Permission denied"),
        ("[Errno 5] nothing of a path", "[Errno 5] nothing of a path"),
        ("mean: 'x'", "mean: 'x'"),
    ],
)
def test_the_path_is_said_first_and_no_number(
    capsys: pytest.CaptureFixture[str], said: str, line: str
) -> None:
    assert fail(said).exit_code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_command_says_it(toy: Path) -> None:
    run = subprocess.run(
        ["ultraflux", "history", "--html", "/proc/none/history.html"],
        cwd=toy,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = "error: /proc/none/history.html: No such file or directory (/proc/none)\n"
    assert (run.returncode, run.stderr) == (BAD_INPUT, said)
