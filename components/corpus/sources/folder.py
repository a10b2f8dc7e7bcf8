"""A local folder as a source of candidates: every file becomes a manifest row, good or bad."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import pandas as pd

from components.corpus.captions.caption_files import KnownFiles
from components.corpus.listing.file_content import HEADER_COLUMNS
from components.corpus.listing.source_files import printable, source_folder
from components.corpus.other_credits import CREDITS, credit_of, joined
from components.corpus.sources.records.separated_values import SeparatedValues
from components.corpus.sources.records.source_records import SourceRecord
from components.corpus.sources.records.text_lines import unmarked_utf_16
from components.settings.corpus import IngestSettings

__all__ = ["file_name", "manifest_of_folder", "read_attribution", "source_folder"]

# Attribution CSV column -> manifest column.
_ATTRIBUTION_COLUMNS = {
    "author": "photographer",
    "author_url": "photographer_url",
    "license": "license",
    "repository": "source",
    "source": "source",
    "image_url": "image_url",
    "work_url": "work_url",
    "query": "query",
}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_LONGEST_CELL = 2**16
"""Characters. A name or an address has hundreds; a cell without end is a file that is no table."""
ATTRIBUTION = "ATTRIBUTION.csv"
"""Customary name of the table of authors and licences in a folder of photographs."""


def _uri(path: Path, root: Path) -> str:
    """Relative to the repository root when inside it, else absolute; always with slashes."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def read_attribution(path: Path) -> dict[str, dict[str, str]]:
    """Read author and licence by file (path below the source folder, with slashes).

    A file of the customary name need not be there: then nothing is known. Another name was chosen
    by a person, and must be.

    Raises:
        ValueError: missing file, another encoding or separator, no `file` column, a row that is not
            the heading's (with its line), or a file named twice (with its line).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if path.name == ATTRIBUTION:
            return {}
        raise ValueError(
            f"{path.name}: attribution file not found in ingest.source; add it or set "
            "ingest.attribution to null"
        ) from None
    # The lists' reader: spreadsheets make the same mistakes in both. Here they end the stage, since
    # a row in the wrong place is somebody else's licence.
    text = StringIO(_text(data, path.name), newline="")
    reader = SeparatedValues(text, path.name, ",", columns=None, url_column=None)
    rows: dict[str, dict[str, str]] = {}
    for record in reader.records():
        # None yet where the heading itself is broken, which `_check_row` says.
        if reader.columns:
            _check_heading(reader.columns, path.name)
        line = f"{path.name} line {record.place.rpartition(':')[2]}"
        _check_row(record, reader.columns, line)
        cells = record.values or {}
        # A spreadsheet writes its empty rows, too.
        if not any(cells.values()):
            continue
        name = cells["file"]
        if name in rows:
            raise ValueError(f"{line}: {name!r} is listed twice")
        rows[name] = {
            column: cells[key] for key, column in _ATTRIBUTION_COLUMNS.items() if cells.get(key)
        }
    _check_heading(reader.columns, path.name)
    return rows


def _check_heading(heading: list[str], name: str) -> None:
    if "file" in heading:
        return
    # One cell that holds another mark: a heading that was not divided.
    cell = heading[0] if len(heading) == 1 else ""
    separated = next((named for mark, named in _SEPARATORS.items() if mark in cell), None)
    raise ValueError(
        f"{name}: its cells are separated by {separated}; save it with commas"
        if separated
        else f"{name}: needs a column 'file', has {', '.join(heading)[:200] or 'nothing'}"
    )


def _check_row(record: SourceRecord, heading: list[str], line: str) -> None:
    """Refuse what a list loses one record by."""
    if record.values is None:
        raise ValueError(f"{line}: {record.problem}")
    # Of a list they are empty cells at the end; here one in the middle would move a licence.
    if len(record.values) < len(heading):
        raise ValueError(f"{line}: {len(record.values)} cells under {len(heading)} headings")
    for column, cell in record.values.items():
        if "\0" in cell:
            raise ValueError(f"{line}: a zero byte under {column!r}")
        if len(cell) > _LONGEST_CELL:
            raise ValueError(f"{line}: more than {_LONGEST_CELL} characters under {column!r}")


def _text(data: bytes, name: str) -> str:
    """UTF-8 with or without a mark; anything else is named, with the way out.

    Raises:
        ValueError: another encoding; one line.
    """
    fix = 'save it as UTF-8 (a spreadsheet calls it "CSV UTF-8")'
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or unmarked_utf_16(data) is not None:
        raise ValueError(f"{name}: is UTF-16; {fix}")
    try:
        # Spreadsheets put a byte order mark before the heading; it would become part of "file".
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        byte = data[problem.start]
        raise ValueError(f"{name}: byte 0x{byte:02X} in line {line} is not UTF-8; {fix}") from None


def _by_photograph(
    attribution: Mapping[str, dict[str, str]], names: pd.Series, file: str
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Rows by the photograph that each means, and the names that mean none, or several.

    Raises:
        ValueError: two rows mean one photograph; the line names both.
    """
    there = set(names)
    if there.issuperset(attribution):
        return dict(attribution), []
    known = KnownFiles(there)
    meant: dict[str, str] = {}
    vain = []
    for name in attribution:
        try:
            photograph = known.find(name)
        except ValueError:
            vain.append(name)
            continue
        if photograph in meant:
            raise ValueError(f"{file}: {meant[photograph]!r} and {name!r} are one photograph")
        meant[photograph] = name
    return {photograph: attribution[name] for photograph, name in meant.items()}, vain


def _named_in_vain(vain: Sequence[str], file: str) -> str | None:
    """What to say of rows whose photograph is not there: renamed, removed or misspelled."""
    if not vain:
        return None
    rows = "1 row names" if len(vain) == 1 else f"{len(vain)} rows name"
    return (
        f"{file}: {rows} no photograph of the source, such as {vain[0][:200]!r}; their licences "
        "are not seen by select.licenses"
    )


def manifest_of_folder(
    listing: pd.DataFrame, settings: IngestSettings, root: Path
) -> tuple[pd.DataFrame, str | None]:
    """Rows of the manifest for the photographs of a source's table.

    A file that cannot be used is a row whose `integrity` says why. A byte-identical copy shares its
    image_id and has `duplicate_of` set; the first in path order is the original. A file whose bytes
    cannot be had gets the hash of its name as image_id.

    Args:
        listing: candidates of `read_listing`.
        settings: the source.
        root: where relative paths start.

    Returns:
        manifest columns known so far, in the order of the table; and what to say of rows of the
        attribution that name no photograph.

    Raises:
        ValueError: folder missing or unreadable; broken attribution file.
    """
    folder = source_folder(settings, root)
    attribution = read_attribution(folder / settings.attribution) if settings.attribution else {}
    names, digests = listing["name"], listing["sha256"]
    has_bytes = digests.notna()
    # Derived, not drawn: the row of a file that cannot be read has the same id in every run.
    unread = names[~has_bytes].map(lambda name: _sha256(f"unreadable:{name}"))
    start = printable(_uri(folder, root))
    manifest = pd.DataFrame(
        {
            "image_id": digests.where(has_bytes, unread),
            "uri": names if start == "." else f"{start.rstrip('/')}/" + names,
            # `duplicated` takes missing digests for equal ones: unreadable files are no copies of
            # each other.
            "duplicate_of": digests.where(has_bytes & digests.duplicated(), None),
            "source": Path(settings.source).name,
            **{name: listing[name] for name in HEADER_COLUMNS},
        }
    )
    rows, vain = _by_photograph(attribution, names, settings.attribution or "")
    given = names.map(lambda name: rows.get(name, {}))
    for column in sorted(set(_ATTRIBUTION_COLUMNS.values())):
        values = given.map(lambda row, column=column: row.get(column))
        if column in manifest:
            # The name of the folder stays as the source of photographs that the table does not
            # name.
            manifest[column] = values.where(values.notna(), manifest[column])
        else:
            manifest[column] = values.astype(object)
    return _with_copies(manifest), _named_in_vain(vain, settings.attribution or "")


def _with_copies(manifest: pd.DataFrame) -> pd.DataFrame:
    """Beside the credit of each original those of its byte-identical copies."""
    alike = manifest[manifest["image_id"].duplicated(keep=False)]
    columns = alike[[name for name in ("image_id", *CREDITS) if name in alike]]
    credits: dict[str, list[tuple[object, dict[str, str]]]] = {}
    # In path order: the first is the original. All rows at once, since there may be a million.
    for place, row in zip(alike.index, columns.to_dict("records"), strict=True):
        credits.setdefault(row["image_id"], []).append((place, credit_of(row)))
    changed = {}
    for (place, own), *others in credits.values():
        unique = {tuple(sorted(other.items())): other for _, other in others}
        completed = joined(own, unique.values())
        if completed != own:
            changed[place] = completed
    if not changed:
        return manifest
    found = pd.DataFrame.from_dict(changed, "index", dtype=object).reindex(manifest.index)
    # Own values are among them, so that nothing else is replaced.
    for name in found:
        manifest[name] = found[name].where(found[name].notna(), manifest.get(name)).astype(object)
    return manifest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(uri: str, folder: Path, root: Path) -> str:
    """Path of a manifest's `uri` below the source folder, with slashes.

    Raises:
        ValueError: the file is not below the folder.
    """
    try:
        return (root / uri).relative_to(folder).as_posix()
    except ValueError:
        raise ValueError(f"{uri}: not below ingest.source; run the ingest stage again") from None
