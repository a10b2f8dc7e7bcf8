"""Any program as a system under test: prompts in a file, pictures in a folder.

The template is split like a shell command but run without a shell. Its placeholders:

    {prompts}          JSONL file, an object a line: id, prompt, seed, width, height, file
    {out}              folder; each picture is written there as its `file`
    {width} {height}   of every picture in this call: one call per size

Finished pictures are moved away one by one and named by what made them (the item, and what is seen
of the program: `program_fingerprint`), so that a program that is killed, or exits early, is asked
for the rest only, and one that changed makes all of them anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from PIL import Image

from components.evaluation.suites.program_fingerprint import ProgramRecord
from components.evaluation.suites.suites import SuiteItem
from components.telemetry.wording import few

_TAIL_CHARACTERS = 400
_TAIL_BYTES = 4 * _TAIL_CHARACTERS
"""No character of UTF-8 has more than four."""
_NAMED_IN_MESSAGES = 3
GRACE_S = 5.0
"""A program that is ended may save what it has."""


def _system_failed(message: str) -> Exception:
    from components.evaluation.suites.system import SystemFailed

    return SystemFailed(message)


def _problem(path: Path, item: SuiteItem) -> str | None:
    """Why a file is not the picture that was asked for; None: it is."""
    if not path.is_file():
        return f"{path.name} was not written"
    try:
        with Image.open(path) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        return f"{path.name} is not a readable picture ({problem})"
    if size != (item.width, item.height):
        return (
            f"{path.name} is {size[0]}x{size[1]}, asked for {item.width}x{item.height} "
            "(width x height)"
        )
    return None


@dataclass(frozen=True)
class CommandSystem:
    """Runs a command for the pictures that are missing."""

    name: str
    template: str
    _said: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Remarking`."""
        return tuple(self._said)

    def __post_init__(self) -> None:
        for placeholder in ("{prompts}", "{out}"):
            if placeholder not in self.template:
                raise ValueError(
                    f"{self.name}: the command lacks {placeholder}; example: "
                    "python my.py --prompts {prompts} --out {out} --size {width}x{height}"
                )

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """A finished file per item; the command runs once per size that is not complete.

        Raises:
            SystemFailed: the command does not start or exits with an error, or pictures are
                missing, unreadable or of another size.
        """
        self._said.clear()
        out_dir.mkdir(parents=True, exist_ok=True)
        program = ProgramRecord(self.template, out_dir)
        paths = [
            out_dir / f"{item.id}_{self._key(item, program.identity)[:16]}.png" for item in items
        ]
        pending = [pair for pair in zip(items, paths, strict=True) if not pair[1].exists()]
        if kept := len(items) - len(pending):
            self._said.append(
                f"{kept} of {len(items)} pictures are those of an earlier run, since the command, "
                "the files that it names, its packages and variables are as they were; to make "
                f"them anew, empty {out_dir}"
            )
        pending.sort(key=lambda pair: (pair[0].height, pair[0].width))
        for (height, width), group in groupby(pending, lambda p: (p[0].height, p[0].width)):
            try:
                self._run(list(group), height, width, out_dir / f".incoming_{width}x{height}")
            finally:
                program.note_logs()
        return paths

    def _key(self, item: SuiteItem, program: str) -> str:
        values = [program, item.prompt, item.seed, item.height, item.width]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _run(
        self, pending: list[tuple[SuiteItem, Path]], height: int, width: int, incoming: Path
    ) -> None:
        pictures = incoming / "pictures"
        # Both were killed: what the command had finished is kept. The names say what it was for.
        self._collect(pending, pictures)
        pending = [pair for pair in pending if not pair[1].exists()]
        shutil.rmtree(incoming, ignore_errors=True)
        if not pending:
            return
        pictures.mkdir(parents=True)
        lines = [
            {
                "id": item.id,
                "prompt": item.prompt,
                "seed": item.seed,
                "width": item.width,
                "height": item.height,
                "file": path.name,
            }
            for item, path in pending
        ]
        prompts = incoming / "prompts.jsonl"
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        prompts.write_text(text + "\n", encoding="utf-8")
        values = {
            "{prompts}": str(prompts.absolute()),
            "{out}": str(pictures.absolute()),
            "{width}": str(width),
            "{height}": str(height),
        }
        try:
            said = self._call(values)
        finally:
            # Also after an error or Ctrl-C.
            problems = self._collect(pending, pictures)
        if said is None and not problems:
            shutil.rmtree(incoming)
            return
        shown = few(problems, _NAMED_IN_MESSAGES, "; ")
        kept = f"{len(pending) - len(problems)} of {len(pending)} pictures are kept"
        parts = [
            said or f"the command ended well, but {shown}",
            *([shown] if said and shown else []),
            f"{kept}, run again {'for the rest' if problems else 'to measure them'}",
        ]
        raise _system_failed(f"{self.name}: {'; '.join(parts)}")

    def _collect(self, pending: Sequence[tuple[SuiteItem, Path]], pictures: Path) -> list[str]:
        """Move whole pictures of the right size to their places; what is wrong with the others."""
        problems = []
        for item, path in pending:
            problem = _problem(pictures / path.name, item)
            if problem is None:
                (pictures / path.name).replace(path)
            else:
                problems.append(problem)
        return problems

    def _call(self, values: dict[str, str]) -> str | None:
        """Run the command; what went wrong, or None."""
        words = []
        for word in shlex.split(self.template):
            for placeholder, value in values.items():
                word = word.replace(placeholder, value)
            words.append(word)
        try:
            code, tail = _run_to_its_end(words)
        except OSError as problem:
            return f"the command does not start: {words[0]}: {problem.strerror}"
        if code == 0:
            return None
        return f"the command ended with code {code} ({tail or 'it said nothing'})"


def _run_to_its_end(words: Sequence[str]) -> tuple[int, str]:
    """(code, end of what it said) of a program; all that it started ends with it, or with us.

    It would go on painting into a folder that the next run empties, and keep the GPU's memory.

    Raises:
        OSError: it does not start.
    """
    # Files and no pipes: those would be waited for as long as anything that it started lives.
    with _ended_by_sigterm(), TemporaryFile() as output, TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=output, stderr=errors, start_new_session=True)
        try:
            process.wait()
        finally:
            _end_group(process)
        return process.returncode, _tail(errors) or _tail(output)


def _tail(file: IO[bytes]) -> str:
    """The last words of a file, in one line."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return " ".join(file.read().decode("utf-8", "replace").split())[-_TAIL_CHARACTERS:]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what lives of a program and of what it started."""
    # Another user's processes, such as those of sudo, are not ours to end.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        try:
            while time.monotonic() < until:
                process.poll()
                # Asks whether anything is left.
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        finally:
            # Also where a second Ctrl-C ends the wait.
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process by way of its `finally` blocks, where nobody else handles it."""
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours:
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
