"""From records to tables with exact accounting: candidates = manifest rows + losses.

Everything streams in batches, so six million candidates need memory for their addresses alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.manifest import SCHEMA, to_arrow
from components.corpus.other_credits import DroppedCopies
from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.corpus.sources.image_probe import header_columns
from components.corpus.sources.originals import original_path
from components.corpus.sources.record_fields import ALIASES, Coverage, extra_json, read_fields
from components.corpus.sources.records.ledger import balanced
from components.corpus.sources.records.source_records import SourceItem
from components.corpus.sources.url_identity import normalise_url
from components.files.parquet_files import RowStream, write_row_groups
from components.images.decoding import ImageHeader, ImageUndecodable, read_header
from components.images.image_store import ImageStore
from components.settings.corpus import IngestSettings

_BATCH_ROWS = 8192
_MIB = 2**20

CANDIDATE_SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        # What the journal knows it by: normalised URL, or place in an archive.
        ("key", pa.string()),
        *((name, pa.string()) for name in ALIASES),
        ("extra", pa.string()),
        ("cause", pa.string()),
        ("detail", pa.string()),
    ]
)
LOSSES_SCHEMA = pa.schema(
    [
        # File and position in it.
        ("record", pa.string()),
        ("url", pa.string()),
        ("cause", pa.string()),
        ("detail", pa.string()),
        # Requests that were repeated count; 0: never asked for.
        ("attempts", pa.int32()),
    ]
)
UNKNOWN_COLUMNS_SCHEMA = pa.schema(
    [
        # Null for losses.
        ("image_id", pa.string()),
        ("record", pa.string()),
        ("image_url", pa.string()),
        ("record_id", pa.string()),
        # JSON object of the keys that no manifest column takes.
        ("extra", pa.string()),
    ]
)

Row = dict[str, Any]


def _batches(rows: Iterable[Row], schema: pa.Schema) -> Iterator[pa.Table]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH_ROWS)):
        yield pa.Table.from_pylist(batch, schema=schema)


def _digest(text: str) -> bytes:
    # Sixteen bytes for an address of any length: the sets of seen ones grow with the source (a
    # collision is as likely as two equal UUIDs).
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _candidate_rows(
    records: Iterable[SourceItem], coverage: Coverage, keyed_by_url: bool
) -> Iterator[Row]:
    seen_urls: set[bytes] = set()
    seen_ids: set[bytes] = set()
    for record in balanced(records, coverage.ledger):
        row: Row = {"record": record.place, "key": None, "cause": None, "detail": None}
        if record.values is None:
            coverage.records += 1
            row |= {"cause": "broken_record", "detail": record.problem}
        else:
            fields = read_fields(record.values)
            coverage.add(fields)
            row |= fields.known
            # A wrong byte costs its character, not the record; how often is said.
            if any("\ufffd" in text for text in fields.known.values()):
                coverage.problems["undecodable_text"] += 1
            row["extra"] = extra_json(fields.extra) if fields.extra else None
            # Counted, not dropped: publishers repeat ids, and the address decides what a photograph
            # is.
            identity = fields.known.get("record_id")
            if identity is not None:
                if _digest(identity) in seen_ids:
                    coverage.problems["duplicate_id"] += 1
                seen_ids.add(_digest(identity))
            if keyed_by_url:
                wrong = "image_url" in fields.wrong_type
                row |= _identify(fields.known.get("image_url"), wrong, seen_urls)
            else:
                row["key"] = record.place
        if row["cause"] is not None:
            coverage.problems[row["cause"]] += 1
        yield row


def _identify(url: str | None, wrong_type: bool, seen: set[bytes]) -> Row:
    """Key of a URL, or why it has none."""
    if url is None:
        cause = "wrong_type" if wrong_type else "missing_url"
        return {"cause": cause, "detail": "image_url is no text" if wrong_type else "no image_url"}
    # With a byte replaced it is another address, and may be another photograph.
    if "\ufffd" in url:
        return {"cause": "bad_url", "detail": "holds bytes that are not UTF-8, or half a character"}
    try:
        key = normalise_url(url)
    except ValueError as problem:
        return {"cause": "bad_url", "detail": str(problem)}
    if _digest(key) in seen:
        return {"cause": "duplicate_url", "detail": key}
    seen.add(_digest(key))
    return {"key": key}


def write_candidates(
    records: Iterable[SourceItem], path: Path, *, keyed_by_url: bool = True
) -> Coverage:
    """Read every record into a table of candidates, problems included.

    Args:
        records: of one source, each file closed by its count.
        path: Parquet file with `CANDIDATE_SCHEMA`.
        keyed_by_url: records with the same normalised URL are one candidate and duplicates;
            otherwise every place is a candidate.

    Returns:
        how well the fields are filled, and the ledger of the source's files.

    Raises:
        ValueError: something of a file is neither a record nor a counted loss (see `Ledger`).
    """
    coverage = Coverage()
    rows = _candidate_rows(records, coverage, keyed_by_url)
    write_row_groups(_batches(rows, CANDIDATE_SCHEMA), CANDIDATE_SCHEMA, path)
    return coverage


def table_coverage(manifest: pd.DataFrame) -> Coverage:
    """How well the attribution of a scanned folder is filled."""
    coverage = Coverage(records=len(manifest), kept=len(manifest))
    for name in ALIASES:
        if name in manifest:
            coverage.filled[name] = int(manifest[name].notna().sum())
    return coverage


def _rows(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()


def pending_keys(
    candidates: Path, journal: DownloadJournal, originals: Path, packed: ImageStore
) -> list[str]:
    """Keys without an outcome, or whose original is neither in the folder nor packed."""
    return [
        row["key"]
        for row in _rows(candidates)
        if row["key"] is not None and not _is_settled(journal.get(row["key"]), originals, packed)
    ]


def _is_settled(outcome: Outcome | None, originals: Path, packed: ImageStore) -> bool:
    if outcome is None:
        return False
    stored = outcome.result
    if isinstance(stored, Loss):
        return True
    path = original_path(originals, stored.sha256, stored.extension)
    # The size, not the hash: millions of originals are looked at before each run, and whoever reads
    # one later checks its bytes.
    if path.is_file() and path.stat().st_size == stored.size_bytes:
        return True
    place = packed.find(stored.sha256)
    return place is not None and place.size == stored.size_bytes and place.shard.is_file()


@dataclass(frozen=True)
class IngestCounts:
    """Exact accounting: candidates == kept + sum of losses."""

    candidates: int
    kept: int
    unreadable: int
    """Kept rows whose header cannot be used."""
    megapixels: float
    losses: dict[str, int]
    """By cause, sorted."""
    originals: frozenset[str]
    """Names of the files that rows point at."""


def _over_limits(stored: Stored, settings: IngestSettings) -> Loss | None:
    """An original fetched under other settings may be outside today's bounds."""
    if stored.size_bytes > settings.download.max_mb * _MIB:
        return Loss("too_large", f"more than {settings.download.max_mb:g} MiB")
    if stored.height is None or stored.width is None:
        return None
    if stored.height * stored.width < settings.download.min_pixels:
        return Loss("too_small", f"{stored.height}x{stored.width}")
    return None


def _header_of(stored: Stored, path: Path) -> ImageHeader | None:
    """What is known of an original's header; read again where the journal is older than that."""
    if stored.header is not None or stored.height is None:
        return stored.header
    try:
        return read_header(path.read_bytes(), max_megapixels=float("inf"))
    except (OSError, ImageUndecodable):
        # Packed elsewhere: its size is known, as it is stored.
        return None


def _manifest_row(
    row: Row, stored: Stored, header: ImageHeader | None, uri: str, settings: IngestSettings
) -> Row:
    columns: Row = {name: row[name] for name in ALIASES if row[name] is not None}
    if row["extra"] is not None:
        columns["source_fields"] = row["extra"]
    # Only where the record says nothing: its own source is nearer to the truth than the list's
    # name.
    columns.setdefault("source", Path(settings.source).stem)
    columns |= {"image_id": stored.sha256, "uri": uri, "integrity": stored.integrity}
    if stored.height is None or stored.width is None:
        return columns
    pixels = stored.height * stored.width
    # A row, not a loss: the bytes are there, and whether they may be decoded is today's setting.
    if pixels / 1e6 > settings.max_megapixels:
        columns["integrity"] = (
            f"too large: {stored.height}x{stored.width} is {pixels / 1e6:.1f} megapixels, "
            f"limit {settings.max_megapixels:g}"
        )
        return columns
    if header is not None:
        return columns | header_columns(header, stored.size_bytes)
    return columns | {
        "width": stored.width,
        "height": stored.height,
        "megapixels": pixels / 1e6,
        "aspect_ratio": stored.width / stored.height,
        "format": stored.format,
        "bytes_per_pixel": stored.size_bytes / pixels,
    }


@dataclass
class _Verdicts:
    """One pass over the candidates; rows are routed to the three tables."""

    journal: DownloadJournal
    originals: Path
    uri_prefix: str
    settings: IngestSettings
    losses: RowStream
    unknown: RowStream

    def __post_init__(self) -> None:
        self.causes: Counter[str] = Counter()
        self.copies = DroppedCopies()
        # Of kept originals only: a copy of a lost one is no duplicate.
        self.first_place: dict[str, str] = {}
        self.files: set[str] = set()
        self.candidates = self.kept = self.unreadable = 0
        self.megapixels = 0.0

    def manifest_rows(self, candidates: Path) -> Iterator[Row]:
        for row in _rows(candidates):
            self.candidates += 1
            outcome = self._outcome(row)
            stored = outcome.result
            if isinstance(stored, Loss):
                self._lose(row, outcome.attempts, stored)
            else:
                yield self._keep(row, stored)
            # Also of losses: nothing that a source says is thrown away.
            if row["extra"] is not None or row["record_id"] is not None:
                image_id = stored.sha256 if isinstance(stored, Stored) else None
                self.unknown.add(
                    {name: row[name] for name in UNKNOWN_COLUMNS_SCHEMA.names if name in row}
                    | {"image_id": image_id}
                )

    def _outcome(self, row: Row) -> Outcome:
        if row["cause"] == "duplicate_url":
            first_of_url = self.journal.get(row["detail"])
            if first_of_url is not None and isinstance(first_of_url.result, Stored):
                self.copies.add(first_of_url.result.sha256, row)
        if row["cause"] is not None:
            return Outcome(0, Loss(row["cause"], row["detail"]))
        outcome = self.journal.get(row["key"])
        if outcome is None:
            raise RuntimeError(f"{row['record']}: no outcome; ingest ended early")
        if isinstance(outcome.result, Loss):
            return outcome
        loss = _over_limits(outcome.result, self.settings)
        first = self.first_place.get(outcome.result.sha256)
        if loss is None and first is not None:
            self.copies.add(outcome.result.sha256, row)
            # `uri` is unique in a manifest, and equal bytes have one place in the store.
            loss = Loss("duplicate_bytes", f"same bytes as {first}")
        return outcome if loss is None else Outcome(outcome.attempts, loss)

    def _lose(self, row: Row, attempts: int, loss: Loss) -> None:
        self.causes[loss.cause] += 1
        self.losses.add(
            {
                "record": row["record"],
                "url": row["image_url"],
                "cause": loss.cause,
                "detail": loss.detail,
                "attempts": attempts,
            }
        )

    def _keep(self, row: Row, stored: Stored) -> Row:
        path = original_path(self.originals, stored.sha256, stored.extension)
        self.first_place[stored.sha256] = row["record"]
        self.files.add(path.name)
        uri = f"{self.uri_prefix}/{path.relative_to(self.originals).as_posix()}"
        header = _header_of(stored, path)
        columns = _manifest_row(row, stored, header, uri, self.settings)
        self.kept += 1
        self.unreadable += columns["integrity"] != "ok"
        self.megapixels += columns.get("megapixels", 0.0)
        return columns


def _losses(folder: Path) -> RowStream:
    return RowStream(folder / "losses.parquet", LOSSES_SCHEMA, _BATCH_ROWS)


def _unknown_columns(folder: Path) -> RowStream:
    return RowStream(folder / "unknown_columns.parquet", UNKNOWN_COLUMNS_SCHEMA, _BATCH_ROWS)


def write_empty_side_tables(folder: Path) -> None:
    """losses.parquet and unknown_columns.parquet of a source that has neither."""
    with _losses(folder), _unknown_columns(folder):
        pass


def _manifest_tables(verdicts: _Verdicts, candidates: Path) -> Iterator[pa.Table]:
    rows = verdicts.manifest_rows(candidates)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield to_arrow(pd.DataFrame(batch), SCHEMA)


def write_ingest_tables(
    candidates: Path,
    journal: DownloadJournal,
    folder: Path,
    uri_prefix: str,
    settings: IngestSettings,
) -> IngestCounts:
    """Write manifest.parquet, losses.parquet and unknown_columns.parquet, in source order.

    Args:
        candidates: see `write_candidates`.
        journal: an outcome for every key.
        folder: for the tables; its subfolder `originals` is the store.
        uri_prefix: how manifests name the store, relative to the repository root.
        settings: today's bounds, applied to what was fetched under any settings.

    Raises:
        RuntimeError: a candidate has no outcome.
    """
    with _losses(folder) as losses, _unknown_columns(folder) as unknown:
        verdicts = _Verdicts(journal, folder / "originals", uri_prefix, settings, losses, unknown)
        write_row_groups(
            _manifest_tables(verdicts, candidates), SCHEMA, folder / "manifest.parquet"
        )
    verdicts.copies.complete(folder / "manifest.parquet")
    return IngestCounts(
        candidates=verdicts.candidates,
        kept=verdicts.kept,
        unreadable=verdicts.unreadable,
        megapixels=verdicts.megapixels,
        losses=dict(sorted(verdicts.causes.items())),
        originals=frozenset(verdicts.files),
    )
