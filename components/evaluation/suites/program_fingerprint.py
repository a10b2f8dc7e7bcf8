"""What a program's pictures depend on beside its prompts, as far as it can be seen from outside.

A command is arbitrary, so this can only be a good guess: the program, the files and folders that
the command names, the Python sources beside a script and the files that those name in quotes, the
packages of the interpreter, and the environment variables that programs of this kind read. What a
program reads beyond that (a service, a path that it computes) cannot be seen, which is why pictures
of an earlier run are never taken without a line that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.files.whole_files import write_text

_QUOTED = re.compile(r"""["']([^"'\n{}]{2,300})["']""")
_WORD = re.compile(r"\b[A-Z][A-Z0-9_]{2,}\b")
_READ_WHOLE_BYTES = 1 << 24
"""Larger files, which are weights, count by name, size and time."""
_MOST_FILES = 4_000
_VARIABLES = ("CUDA_", "HF_", "TORCH_", "TRANSFORMERS_", "DIFFUSERS_", "PYTORCH_", "LD_LIBRARY")
_PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV", "CONDA_PREFIX")
_SOURCE_SUFFIXES = (".py", ".sh", ".bash", ".js", ".lua", ".rb", ".yaml", ".yml", ".json", ".toml")
_VARIABLE = "variable"
_NO_SOURCES = frozenset({"site-packages", "node_modules", "__pycache__"})


Seen = dict[str, str]
"""Path, variable or other name to a text that is another one when it changed."""


def _file_state(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _READ_WHOLE_BYTES:
            return f"{size} {path.stat().st_mtime_ns}"
        data = path.read_bytes()
        return f"{len(data)} {hashlib.sha256(data).hexdigest()}"
    except OSError as problem:
        return f"unreadable: {problem.strerror}"


def _files_below(folder: Path) -> Iterator[Path]:
    count = 0
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in _NO_SOURCES
        )
        for name in sorted(names):
            if name.startswith("."):
                continue
            count += 1
            if count > _MOST_FILES:
                return
            yield Path(place, name)


def _state(path: Path, own: Path) -> dict[str, str]:
    """Of a file or folder, by path; a folder that holds the results is no input of them."""
    if path.is_file():
        return {str(path): _file_state(path)}
    if not path.is_dir() or own.resolve().is_relative_to(path.resolve()):
        return {}
    # A folder is weights or data: names, sizes and times, since hashing could take minutes.
    return {
        str(file): f"{file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in _files_below(path)
        if file.is_file()
    }


def _existing(text: str) -> Path | None:
    """The path that a text names, if it is there; a bare word is no path."""
    if "/" not in text and "." not in text.strip("."):
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _sources_beside(script: Path) -> list[Path]:
    """Python files below the script's folder, which it may import."""
    if script.suffix != ".py":
        return []
    return [file for file in _files_below(script.parent) if file.suffix == ".py"]


def _packages(program: Path) -> list[str]:
    """Names and versions installed beside an interpreter, as its folder lists them."""
    # Not resolved: the link of a virtual environment leads to the interpreter of all of them.
    library = program.parent.parent / "lib"
    return sorted(folder.name for folder in library.glob("python*/site-packages/*.dist-info"))


def seen_of(template: str, own: Path, environment: Mapping[str, str] | None = None) -> Seen:
    """Everything that is seen of a command, by what it is.

    Args:
        template: the command with its placeholders.
        own: folder of the results, which lies in no input.
        environment: of the process by default.
    """
    variables = os.environ if environment is None else environment
    words = shlex.split(template)
    seen = {"command": template}
    if words and (program := shutil.which(words[0])) is not None:
        seen |= _state(Path(program).resolve(), own)
        seen["packages"] = " ".join(_packages(Path(program)))
    named = [path for word in words[1:] for part in word.split("=") if (path := _existing(part))]
    sources = {file: None for path in named if path.is_file() for file in _sources_beside(path)}
    sources |= dict.fromkeys(p for p in named if p.is_file() and p.suffix in _SOURCE_SUFFIXES)
    mentioned: set[str] = set()
    for path in [*named, *sources]:
        seen |= _state(path, own)
    for source in sources:
        if source.stat().st_size > _READ_WHOLE_BYTES:
            continue
        text = source.read_text(encoding="utf-8", errors="replace")
        mentioned |= set(_WORD.findall(text))
        for quoted in _QUOTED.findall(text):
            if (path := _existing(quoted)) is not None:
                seen |= _state(path, own)
    return seen | {
        f"{_VARIABLE} {name}": value
        for name, value in variables.items()
        if name.startswith(_VARIABLES) or name in _PYTHON_VARIABLES or name in mentioned
    }


def _may_be_written(name: str) -> bool:
    """Whether a program may write this itself while it works; its sources are what it is."""
    return not name.startswith(_VARIABLE) and Path(name).suffix not in _SOURCE_SUFFIXES


def _is_grown(path: str, before: str | None) -> bool:
    """Whether a file appeared or grew at its end: a log, no input."""
    if before is None:
        return True
    size, _, digest = before.partition(" ")
    try:
        with Path(path).open("rb") as file:
            return hashlib.sha256(file.read(int(size))).hexdigest() == digest
    except (OSError, ValueError):
        return False


class ProgramRecord:
    """What made the pictures of a folder, kept in it, so that a change is seen by the next run.

    Args:
        template: the command.
        folder: where its pictures are; made when missing.
    """

    def __init__(self, template: str, folder: Path) -> None:
        self._template, self._folder = template, folder
        self._file = folder / ".program.json"
        self._seen = seen_of(template, folder)
        known: dict[str, Any] = {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            known = found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            pass
        self._logs: set[str] = set(known.get("logs", ()))
        self._rewritten: set[str] = set(known.get("rewritten", ()))
        inputs = {name: value for name, value in self._seen.items() if name not in self._logs}
        self.identity = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        """Another one whenever something that is seen of the program changed."""
        if known.get("inputs") == inputs:
            self.identity = known["identity"]
        self._inputs = inputs
        self._write()

    def note_logs(self) -> None:
        """After the command ran: what it wrote itself is none of its inputs.

        A file that was begun anew may be a log, or weights that somebody replaced meanwhile. So it
        stays an input until it is rewritten under the command a second time.
        """
        after = seen_of(self._template, self._folder)
        changed = {
            name
            for name, value in after.items()
            if self._seen.get(name) != value and _may_be_written(name)
        } - self._logs
        grown = {name for name in changed if _is_grown(name, self._seen.get(name))}
        logs = grown | (changed & self._rewritten)
        self._rewritten = (self._rewritten | changed) - logs
        # The next run is compared with what this one left.
        self._seen = after
        if changed:
            self._logs |= logs
            self._inputs = {k: v for k, v in self._inputs.items() if k not in logs}
            self._write()

    def _write(self) -> None:
        values = {
            "identity": self.identity,
            "inputs": self._inputs,
            "logs": sorted(self._logs),
            "rewritten": sorted(self._rewritten),
        }
        write_text(self._file, json.dumps(values, indent=1, sort_keys=True) + "\n")
