"""What is seen of a command from outside: each thing that changes shows, and nothing else does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from components.evaluation.suites.program_fingerprint import ProgramRecord, seen_of

SCRIPT = """
import os
from helper import steps
TABLE = "{table}"
os.environ.get("PAINTER_MODE")
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    """`painter` of an environment of its own, a script beside a helper, and weights."""
    program = tmp_path / "venv" / "bin" / "painter"
    table, weights = tmp_path / "colours.txt", tmp_path / "weights" / "unet" / "a.bin"
    package = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "torch-2.1.dist-info"
    script = tmp_path / "code" / "paint.py"
    for path in (program, table, weights, script):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    package.mkdir(parents=True)
    program.chmod(0o755)
    script.write_text(SCRIPT.format(table=table))
    (script.parent / "helper.py").write_text("steps = 1\n")
    return f"{program} {script} --weights={tmp_path / 'weights'} --out {{out}}"


CHANGES: dict[str, Callable[[Path], object]] = {
    "the program": lambda at: (at / "venv" / "bin" / "painter").write_text("2"),
    "the script": lambda at: (at / "code" / "paint.py").write_text("pass\n"),
    "what it imports": lambda at: (at / "code" / "helper.py").write_text("steps = 2\n"),
    "what it names": lambda at: (at / "colours.txt").write_text("2"),
    "weights": lambda at: os.utime(at / "weights" / "unet" / "a.bin", ns=(1, 1)),
    "one more weight": lambda at: (at / "weights" / "b.bin").write_text("1"),
    "a package": lambda at: (
        (at / "venv" / "lib" / "python3.11" / "site-packages")
        .joinpath("diffusers-0.30.dist-info")
        .mkdir()
    ),
}
VARIABLES = {"HF_HOME": "/hub", "PAINTER_MODE": "fast", "EDITOR": "vi"}


@pytest.mark.parametrize("what", CHANGES)
def test_what_pictures_depend_on_is_seen(command: str, tmp_path: Path, what: str) -> None:
    before = seen_of(command, tmp_path / "pictures", {})
    assert before == seen_of(command, tmp_path / "pictures", {})
    CHANGES[what](tmp_path)
    after = seen_of(command, tmp_path / "pictures", {})
    assert {name for name in before | after if before.get(name) != after.get(name)}


def test_variables_that_the_program_reads_are_seen_and_others_are_not(
    command: str, tmp_path: Path
) -> None:
    before = seen_of(command, tmp_path / "pictures", {})
    after = seen_of(command, tmp_path / "pictures", VARIABLES)
    expected = {"variable HF_HOME": "/hub", "variable PAINTER_MODE": "fast"}
    assert {name: after[name] for name in after if name not in before} == expected


def test_a_folder_that_holds_the_pictures_is_no_input(command: str, tmp_path: Path) -> None:
    own = tmp_path / "weights" / "pictures"
    own.mkdir()
    before = seen_of(command, own, {})
    CHANGES["one more weight"](tmp_path)
    assert seen_of(command, own, {}) == before


def identities(command: str, tmp_path: Path, *writes: Callable[[Path], object]) -> list[str]:
    """Of a run after another, during each of which something is written; then of one more."""
    own = tmp_path / "pictures"
    own.mkdir(exist_ok=True)
    found = []
    for write in writes:
        record = ProgramRecord(command, own)
        found.append(record.identity)
        write(tmp_path)
        record.note_logs()
    return [*found, ProgramRecord(command, own).identity]


def appended(at: Path) -> None:
    with (at / "run.log").open("a") as log:
        log.write("one more line\n")


def test_a_log_that_appears_or_grows_is_no_input(command: str, tmp_path: Path) -> None:
    logging = f"{command} --log {tmp_path / 'run.log'}"
    assert len(set(identities(logging, tmp_path, appended, appended))) == 1


def test_a_log_that_is_begun_anew_costs_the_pictures_once(command: str, tmp_path: Path) -> None:
    lines = iter(range(9))
    log = tmp_path / "run.log"
    log.write_text("of a run by hand\n")
    logging = f"{command} --log {log}"
    first, second, third, fourth = identities(
        logging, tmp_path, *[lambda _: log.write_text(f"run {next(lines)}\n")] * 3
    )
    assert first != second
    assert second == third == fourth


def test_weights_that_are_replaced_under_a_run_make_the_pictures_anew(
    command: str, tmp_path: Path
) -> None:
    first, second, third, fourth = identities(
        command, tmp_path, CHANGES["weights"], lambda _: None, lambda _: None
    )
    assert first != second
    assert second == third == fourth
    CHANGES["one more weight"](tmp_path)
    assert ProgramRecord(command, tmp_path / "pictures").identity != fourth
