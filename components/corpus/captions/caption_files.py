"""Captions in files: a JSONL file in the folder, and text files beside the photographs.

What cannot be used is a loss with its place, never the end of a stage: half a million lines of
which one is wrong are half a million captions less one.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import posixpath
import stat
import unicodedata
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from components.corpus.captions.checks import Caption
from components.corpus.captions.flaws import is_undecoded, is_unreadable
from components.corpus.captions.spilled import Spilled
from components.corpus.listing.source_files import is_of_system
from components.files.parquet_files import storable

SIDECAR = ".txt"
_MAX_SIDECAR_BYTES = 2**20
"""A caption has a few hundred words: what is larger is another kind of file."""
# Windows' editors begin a file with one of these; without them text is UTF-8.
_WIDE_MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


@dataclass(frozen=True)
class CaptionLoss:
    """A line or a file that gives no caption."""

    record: str
    """Such as "captions.jsonl line 3" or "lakes/a.txt"."""
    detail: str

    def __str__(self) -> str:
        """As one line."""
        return f"{self.record}: {self.detail}"


def comparable_name(name: str) -> str:
    r"""The spelling in which file names are compared.

    macOS writes accents as marks of their own (NFD) and most others as one character (NFC); lists
    made on Windows have "\", and those of `find` begin with "./".
    """
    name = unicodedata.normalize("NFC", name.strip().lstrip("\ufeff").replace("\\", "/"))
    return posixpath.normpath(name) if name else name


class KnownFiles:
    """The photographs of a folder, found by any spelling of their names."""

    def __init__(self, files: Collection[str]) -> None:
        """Index `files`, paths below the folder with slashes."""
        self._files = frozenset(files)
        # None: several have this spelling.
        self._by_spelling: dict[str, str | None] = {}
        for file in self._files:
            spelling = comparable_name(file)
            self._by_spelling[spelling] = None if spelling in self._by_spelling else file

    def find(self, name: str) -> str:
        """The photograph that `name` means: itself, else the only one of that spelling.

        Raises:
            ValueError: there is none, or more than one.
        """
        # Exact names first: two files may differ in nothing but the spelling of an accent.
        if name in self._files:
            return name
        spelling = comparable_name(name)
        found = self._by_spelling.get(spelling)
        if found is None:
            is_known = spelling in self._by_spelling
            why = "fits several photographs" if is_known else "is not a photograph"
            raise ValueError(f"{name!r} {why} of ingest.source")
        return found


def _parse(line: str) -> tuple[str, Caption]:
    """(file, caption) of one line; text that no file can hold becomes U+FFFD.

    Raises:
        ValueError: the line is not an object with these.
    """
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem.msg} at column {problem.colno}") from None
    except (RecursionError, ValueError):
        # Thousands of brackets, or of digits.
        raise ValueError("not JSON that can be read") from None
    if not isinstance(record, dict):
        raise ValueError("expected an object with file, caption_en and caption_zh")
    for key, kinds in (("file", str), ("caption_en", str), ("caption_zh", str | None)):
        if not isinstance(record.get(key), kinds):
            # ascii(): the value may hold what no terminal and no table takes.
            raise ValueError(f"{key!r} must be text, got {ascii(record.get(key))[:60]}")
    file: str = record["file"]
    english: str = record["caption_en"]
    chinese: str | None = record.get("caption_zh")
    if is_undecoded(file):
        raise ValueError("'file' has characters that no file name can have")
    return file, Caption(storable(english), None if chinese is None else storable(chinese))


def _raw_lines(stream: BinaryIO) -> Iterable[bytes]:
    r"""Lines in UTF-8, without a mark; only "\n" ends one, a text stream would see others."""
    start = stream.read(3)
    for mark, encoding in _WIDE_MARKS.items():
        if start.startswith(mark):
            stream.seek(len(mark))
            wide = io.TextIOWrapper(stream, encoding, "replace", newline="\n")
            return (line.encode("utf-8", "replace") for line in wide)
    stream.seek(len(codecs.BOM_UTF8) if start == codecs.BOM_UTF8 else 0)
    return stream


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str | None]]:
    """(number from 1, text or None where it is not UTF-8) of lines that are not blank."""
    # Split before decoding, so that a wrong byte costs its line alone.
    for number, line in enumerate(_raw_lines(stream), start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8").removesuffix("\n")
            except UnicodeDecodeError:
                yield number, None


def read_captions(
    path: Path, known_files: Collection[str]
) -> tuple[Mapping[str, Caption], list[CaptionLoss]]:
    """Read a captions.jsonl: UTF-8 (or UTF-16 with its mark), with or without a BOM.

    Args:
        path: one JSON object a line: file (below the ingest source), caption_en, caption_zh.
        known_files: files of the corpus; names match in any spelling (`comparable_name`).

    Returns:
        (caption by file, on disk; what could not be used): lines that are no such object, name a
        file a second time, or one that is not in the corpus. A line whose text had to be mended has
        both.

    Raises:
        ValueError: no such file, or it has lines and none can be used: another kind of file.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise ValueError(
            f"{path.name}: not found in ingest.source, and no photograph has a text file beside it "
            f"(a{SIDECAR} beside a.jpg); add captions or correct caption.file"
        ) from None
    except OSError as problem:
        raise ValueError(f"{path.name}: cannot read: {problem.strerror}") from None
    known = KnownFiles(known_files)
    captions = Spilled(Caption)
    first_line: dict[str, int] = {}
    losses: list[CaptionLoss] = []
    with stream:
        for number, line in _lines(stream):
            where = f"{path.name} line {number}"
            try:
                if line is None:
                    raise ValueError("not UTF-8")
                name, caption = _parse(line)
                file = known.find(name)
                if file in first_line:
                    raise ValueError(f"{name!r} has a caption already, on line {first_line[file]}")
            except ValueError as problem:
                losses.append(CaptionLoss(where, str(problem)))
                continue
            first_line[file] = number
            captions.add(file, caption)
            if is_unreadable(caption.english + (caption.chinese or "")):
                losses.append(
                    CaptionLoss(where, "control characters, or such as could not be read")
                )
    # One wrong line of many is a loss; all of them wrong mean that the wrong file is named.
    if losses and not captions:
        raise ValueError(
            f"{path.name}: none of its {len(losses)} lines can be used, the first because: "
            f"{losses[0]}"
        )
    return captions, losses


@dataclass
class _Beside:
    """What one folder holds, by stem: the name without its ending."""

    texts: dict[str, list[str]]
    """Names of text files by their composed stem."""
    stems: set[str]
    """Of photographs, as they are spelled, where a stem has several spellings."""
    unclaimed: list[str]
    """Text files that are of no photograph."""

    def of(self, stem: str) -> str | None:
        """The text file of a photograph: of exactly its stem, else the only one of its spelling.

        Raises:
            ValueError: several fit.
        """
        fitting = self.texts.get(unicodedata.normalize("NFC", stem), [])
        # One that is exactly another photograph's is that one's alone.
        fitting = [name for name in fitting if _stem(name) == stem] or [
            name for name in fitting if _stem(name) not in self.stems
        ]
        exact = stem + SIDECAR
        if len(fitting) > 1 and exact not in fitting:
            raise ValueError(f"several text files fit, such as {fitting[0]} and {fitting[1]}")
        return exact if exact in fitting else next(iter(fitting), None)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


class Sidecars:
    """Text files beside photographs: `a.txt` for `a.jpg`, found in either spelling of accents."""

    def __init__(self, folder: Path, endings: Container[str]) -> None:
        """Look nowhere yet; each folder below `folder` is listed once.

        Args:
            folder: the source.
            endings: of photographs, in lower case, with the dot.
        """
        self._folder = folder
        self._endings = endings
        self._listed: dict[str, _Beside] = {}

    def _beside(self, below: str) -> _Beside:
        if below not in self._listed:
            try:
                names = os.listdir(self._folder / below)
            except OSError:
                # A folder that went away has no photographs either, which others report.
                names = []
            self._listed[below] = self._sorted(name for name in names if not is_of_system(name))
        return self._listed[below]

    def _sorted(self, names: Iterable[str]) -> _Beside:
        found = _Beside({}, set(), [])
        photographs = []
        for name in sorted(names):
            stem, ending = posixpath.splitext(name)
            if ending.lower() == SIDECAR:
                found.texts.setdefault(unicodedata.normalize("NFC", stem), []).append(name)
            elif ending.lower() in self._endings:
                photographs.append(stem)
                if not stem.isascii():
                    found.stems.add(stem)
        left = {name for several in found.texts.values() for name in several}
        for stem in photographs:
            with contextlib.suppress(ValueError):
                left.discard(found.of(stem) or "")
        found.unclaimed = sorted(left)
        return found

    def find(self, file: str) -> str | None:
        """The text file beside a photograph, below the folder; None: there is none.

        Raises:
            ValueError: several fit, and none is spelled as the photograph.
        """
        below, name = posixpath.split(file)
        found = self._beside(below).of(_stem(name))
        return None if found is None else posixpath.join(below, found)

    def has(self, file: str) -> bool:
        """Whether a photograph has a text file beside it, or several that fit."""
        try:
            return self.find(file) is not None
        except ValueError:
            return True

    def unclaimed(self, table: str) -> CaptionLoss | None:
        """Text files of the folders that were looked into and belong to no photograph there.

        Args:
            table: the file of captions, which is none of them.
        """
        names = [
            name
            for below, beside in self._listed.items()
            for text in beside.unclaimed
            if (name := posixpath.join(below, text)) != table
        ]
        if not names:
            return None
        others = f", and {len(names) - 1} more" if len(names) > 1 else ""
        return CaptionLoss(names[0], f"a text file beside no photograph of its name{others}")

    def read(self, sidecar: str) -> str:
        """Its text on one line.

        Raises:
            ValueError: it is no text: not a file, too large, or not UTF-8.
        """
        path = self._folder / sidecar
        try:
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise ValueError("symbolic link that leaves the source folder; not followed")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                # Reading a pipe would wait for ever.
                raise ValueError("not a regular file")
            if status.st_size > _MAX_SIDECAR_BYTES:
                raise ValueError(f"{status.st_size} bytes are no caption")
            data = path.read_bytes()
        except OSError as problem:
            raise ValueError(f"cannot read: {problem.strerror}") from None
        except RuntimeError:
            # Until Python 3.12 `resolve` names a loop of links by this.
            raise ValueError("symbolic links in a loop") from None
        lines = list(_lines(io.BytesIO(data)))
        if any(text is None for _, text in lines):
            raise ValueError("not UTF-8")
        return " ".join(" ".join(text.split()) for _, text in lines if text)
