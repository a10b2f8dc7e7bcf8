"""Text files of unknown origin as numbered physical lines, and the encoding that they are in."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeError)
"""What reading a file, gzipped or not, may raise."""
LONGEST_LINE = 2**26
"""Characters. A line of ten million holds a long caption; a file without line ends must not be
read into memory."""
_BYTE_ORDER_MARKS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_SCAN_BYTES = 2**20
_HEAD_BYTES = 4096
# Of the bytes of text in UTF-16: half of all where it is Latin, few where it is Chinese, but its
# line ends, commas and addresses are Latin in a list.
_UTF_16_ZEROS = 0.15
_WRONG_BYTE = re.compile("[\udc80-\udcff]")


def _open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def marked_encoding(start: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), None)


def unmarked_utf_16(start: bytes) -> str | None:
    """The byte order of UTF-16 without a mark, told from its zero bytes; fewer are damage."""
    # Latin text has a zero in every second byte; on which side says the byte order.
    head = start[:_HEAD_BYTES]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd <= _UTF_16_ZEROS * len(head):
        return None
    return "utf-16-le" if even < odd else "utf-16-be"


def open_text(path: Path, encoding: str | None = None) -> TextIO:
    """A text file for reading, gzipped or not; wrong bytes become U+FFFD.

    Args:
        path: the file.
        encoding: of files without a byte order mark; UTF-8 if None.

    Raises:
        READ_ERRORS: it cannot be read; also later, while reading.
    """
    file = _open_bytes(path)
    try:
        # Peeked, because a gzip stream cannot go back cheaply.
        start = file.peek(4)[:4]
    except BaseException:
        file.close()
        raise
    name = marked_encoding(start) or encoding or "utf-8"
    # Line ends stay: inside a quoted field they belong to the caption, and "\r" alone ends old
    # files.
    return io.TextIOWrapper(file, encoding=name, errors="replace", newline="")


def read_problem(problem: BaseException) -> str:
    """One line about one of `READ_ERRORS`, without the path."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"cannot read: {problem.strerror}"
    return f"cannot read: {' '.join(str(problem).split()) or type(problem).__name__}"


def wrong_encoding(problem: UnicodeError, encoding: str | None) -> str:
    """What to say of a file that cannot be text in the encoding of the settings."""
    return (
        f"is no text in {encoding} ({problem}); set ingest.lists.encoding to what it is in, such "
        "as utf-8, utf-16-le or cp1252"
    )


def foreign_encoding(path: Path) -> str | None:
    """What says that a file is text in another encoding than UTF-8; None when it is UTF-8.

    All of it is scanned, since the first letter outside ASCII may come late. A damaged UTF-8 file,
    in which right sequences outnumber wrong bytes, is UTF-8.

    Raises:
        READ_ERRORS: it cannot be read to its end.
    """
    right = wrong = lines = 0
    first = ""
    with _open_bytes(path) as file:
        while chunk := file.read(_SCAN_BYTES):
            if lines == 0 and marked_encoding(chunk):
                return None
            if lines == 0 and (name := unmarked_utf_16(chunk)) is not None:
                return f"zero bytes as in UTF-16; set ingest.lists.encoding to {name}"
            # Whole lines: no UTF-8 sequence holds the byte of a line end.
            chunk += file.readline(LONGEST_LINE)
            if not chunk.isascii():
                text = chunk.decode("utf-8", "surrogateescape")
                # A right sequence of n bytes is one character, a wrong byte is one as well.
                right += len(chunk) - len(text)
                found = _WRONG_BYTE.search(text)
                if found is not None:
                    wrong += len(_WRONG_BYTE.findall(text))
                    line = lines + text.count("\n", 0, found.start()) + 1
                    first = first or f"byte 0x{ord(found.group()) - 0xDC00:02X} in line {line}"
            lines += chunk.count(b"\n") or 1
    # Latin-1 read as UTF-8 has wrong bytes and almost no right sequences; a damaged UTF-8 file the
    # reverse.
    if wrong <= right:
        return None
    return (
        f"{first} is not UTF-8; set ingest.lists.encoding to what it is in, such as cp1252 "
        "(Western European, Latin-1), or to utf-8 to read wrong bytes as U+FFFD"
    )


class Lines:
    """Physical lines of a text file, with their ends, counted as they are read.

    Args:
        file: opened with newline="", so that line ends stay as they are.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._ahead: deque[str] = deque()
        self._failure: BaseException | None = None
        self.read = 0
        """Lines read from the file so far."""
        self.number = 0
        """Of the line taken last, from 1."""

    def take(self) -> str | None:
        """The next line; None at the end.

        Raises:
            READ_ERRORS: the file ends early; every line before that has been taken.
        """
        line = self._ahead.popleft() if self._ahead else self._next()
        if line is not None:
            self.number += 1
        elif self._failure is not None:
            raise self._failure
        return line

    def ahead(self) -> Iterator[str]:
        """Lines after the one taken last; they stay to be taken."""
        at = 0
        while True:
            if at == len(self._ahead):
                line = self._next()
                if line is None:
                    return
                self._ahead.append(line)
            yield self._ahead[at]
            at += 1

    def skip(self, number: int) -> None:
        """Take lines that `ahead` has shown."""
        for _ in range(number):
            self._ahead.popleft()
        self.number += number

    def _next(self) -> str | None:
        if self._failure is not None:
            return None
        try:
            line = self._file.readline(LONGEST_LINE)
        except READ_ERRORS as problem:
            # Lines that were looked at ahead of it are still to be taken.
            self._failure = problem
            return None
        if not line:
            return None
        self.read += 1
        if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
            # Read past in pieces, so that the next line begins where it does in the file.
            while (rest := self._file.readline(LONGEST_LINE)) and not rest.endswith(("\n", "\r")):
                pass
        return line


def is_too_long(line: str) -> bool:
    """Whether `Lines` has cut the line."""
    return len(line) == LONGEST_LINE and not line.endswith(("\n", "\r"))
