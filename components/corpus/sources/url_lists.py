"""Lists of photographs to fetch: CSV, JSONL and Parquet files, read as a stream of records.

Text may be gzipped (`list.csv.gz`) and is UTF-8, or UTF-16 behind its byte order mark; other bytes
become U+FFFD, which the tables of ingest count, and refuse in addresses.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

_TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
LIST_ENDINGS = (*_TEXT_ENDINGS, *(f"{ending}.gz" for ending in _TEXT_ENDINGS), ".parquet")
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file, gzipped or not, may raise."""
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class SourceRecord:
    """One record of a source, or the place of one that cannot be read."""

    place: str
    """File and position, such as "list.csv:12"; unique within a source."""
    values: dict[str, Any] | None
    """None: the record is broken."""
    problem: str = ""


def source_files(source: Path, endings: tuple[str, ...], shown: str) -> list[Path]:
    """The file itself, or the files of a folder (recursively) in sorted order.

    Args:
        source: file or folder.
        endings: lower case, with the dot.
        shown: how messages name the source.

    Raises:
        ValueError: missing, unreadable or nothing inside.
    """
    advice = f"point ingest.source at a file or folder of {', '.join(endings)}"
    if not source.exists():
        raise ValueError(f"{shown}: no such file or folder; {advice}")
    if source.is_file():
        if not source.name.lower().endswith(endings):
            raise ValueError(f"{shown}: unknown kind of file; {advice}")
        return [source]
    found = [path for path in source.rglob("*") if path.name.lower().endswith(endings)]
    files = sorted(
        (path for path in found if path.is_file()),
        key=lambda path: path.relative_to(source).as_posix(),
    )
    if not files:
        raise ValueError(f"{shown}: no files inside; {advice}")
    return files


def place_of(path: Path, source: Path) -> str:
    """Name of a list file below the source, with slashes."""
    return path.name if path == source else path.relative_to(source).as_posix()


def open_text(path: Path) -> TextIO:
    """A text file for reading, gzipped or not, in the encoding that its first bytes name.

    Raises:
        READ_ERRORS: it cannot be read; also later, while reading.
    """
    is_packed = path.suffix.lower() == ".gz"
    file = gzip.open(path) if is_packed else path.open("rb")  # noqa: SIM115 - callers close it
    try:
        start = file.peek(2)[:2]
    except BaseException:
        file.close()
        raise
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="")


def read_problem(problem: BaseException) -> str:
    """One line about one of `READ_ERRORS`, without the path."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"cannot read: {problem.strerror}"
    return f"cannot read: {' '.join(str(problem).split()) or type(problem).__name__}"


def parse_json(text: str) -> Any:
    """JSON from untrusted text.

    Raises:
        ValueError: not JSON, numbers too long, nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _csv_records(path: Path, name: str) -> Iterator[SourceRecord]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    is_tabbed = path.name.lower().removesuffix(".gz").endswith(".tsv")
    with open_text(path) as file:
        reader = csv.reader(file, delimiter="\t" if is_tabbed else ",")
        header = next(reader, None)
        if header is None:
            return
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                yield SourceRecord(f"{name}:{reader.line_num}", None, f"not CSV: {problem}")
                continue
            if not row:
                continue
            place = f"{name}:{reader.line_num}"
            if len(row) > len(header):
                yield SourceRecord(place, None, f"{len(row)} cells under {len(header)} headings")
                continue
            yield SourceRecord(place, dict(zip(header, row, strict=False)))


def _jsonl_records(path: Path, name: str) -> Iterator[SourceRecord]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                values = parse_json(line)
            except ValueError as problem:
                yield SourceRecord(place, None, str(problem))
                continue
            if isinstance(values, dict):
                yield SourceRecord(place, values)
            else:
                yield SourceRecord(place, None, f"a {type(values).__name__}, not an object")


def _parquet_records(path: Path, name: str) -> Iterator[SourceRecord]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRecord(f"{name}:{number}", values)
    except (pa.ArrowException, OSError) as problem:
        detail = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        yield SourceRecord(f"{name}:{number + 1}", None, f"broken Parquet file: {detail}")


def read_url_lists(source: Path, shown: str) -> Iterator[SourceRecord]:
    """Every record of every list, in sorted order of files.

    Raises:
        ValueError: see `source_files`.
    """
    readers = {".parquet": _parquet_records, ".jsonl": _jsonl_records, ".ndjson": _jsonl_records}
    for path in source_files(source, LIST_ENDINGS, shown):
        read = readers.get(Path(path.name.lower().removesuffix(".gz")).suffix, _csv_records)
        name = place_of(path, source)
        try:
            yield from read(path, name)
        except READ_ERRORS as problem:
            yield SourceRecord(name, None, read_problem(problem))
