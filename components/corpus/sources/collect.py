"""A source's candidates, brought in and counted: from disk, from archives or from the web.

At a prompt, without the stage::

    settings, table = load_settings(Path("params.yaml")), Path("mine/listing.parquet")
    describe_source(settings.ingest, table, root=Path(), limits=EngineLimits.of(settings))
    collect(settings.ingest, Path("mine"), root=Path(), state_dir=Path("runs/me"), listing=table)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from components.corpus.listing.source_table import read_listing
from components.corpus.manifest import write_table
from components.corpus.sources.download_journal import DownloadJournal
from components.corpus.sources.downloader import Downloader, DownloadProgress
from components.corpus.sources.folder import manifest_of_folder
from components.corpus.sources.ingest_tables import (
    pending_keys,
    table_coverage,
    write_candidates,
    write_empty_side_tables,
    write_ingest_tables,
)
from components.corpus.sources.multiaspect import SHARD_ENDINGS, read_metadata_shards
from components.corpus.sources.originals import prune_originals
from components.corpus.sources.record_fields import Coverage
from components.corpus.sources.records.source_records import (
    SourceItem,
    SourceRecord,
    files_not_read,
)
from components.corpus.sources.url_lists import LIST_ENDINGS, read_url_lists
from components.corpus.sources.webdataset import ARCHIVE_ENDINGS, read_webdataset
from components.files.whole_files import write_text
from components.images.image_store import FOLDER, ImageStore
from components.settings.corpus import DownloadSettings, IngestSettings
from components.telemetry.progress import track

_ENDINGS = {"urls": LIST_ENDINGS, "multiaspect": SHARD_ENDINGS, "webdataset": ARCHIVE_ENDINGS}
ORIGINALS = "data/ingest/originals"
"""What `uri` of a fetched or unpacked original begins with in the pipeline's manifest."""


@dataclass(frozen=True)
class Collected:
    """Exact accounting: candidates == kept + sum of losses."""

    candidates: int
    kept: int
    unreadable: int
    """Kept rows whose header or bytes cannot be used."""
    duplicates: int
    megapixels: float
    losses: dict[str, int] = field(default_factory=dict)
    """By cause, sorted; a folder loses nothing."""
    remark: str | None = None
    """What a person should look at though nothing is lost by it; one line."""

    @property
    def described_losses(self) -> str:
        """Such as "gone 3, too_small 1"."""
        return ", ".join(f"{cause} {number}" for cause, number in self.losses.items())


def collect(
    settings: IngestSettings,
    folder: Path,
    *,
    root: Path,
    state_dir: Path,
    listing: Path | None = None,
    originals_uri: str = ORIGINALS,
    first: int | None = None,
) -> Collected:
    """Write the manifest of a source's candidates, and what is lost or unknown beside it.

    `folder` gets manifest.parquet (a row per candidate that is there), losses.parquet (one per
    candidate that is not), unknown_columns.parquet, coverage.json, and originals/: fetched or
    unpacked bytes, empty for a folder of photographs, which stay where they are.

    Args:
        settings: the source.
        folder: output, created.
        root: where relative paths start; `runs/downloads` below it keeps what addresses gave.
        state_dir: survives kills.
        listing: table of `describe_source`; a folder's photographs are taken from it.
        originals_uri: what the manifest calls `folder`/originals.
        first: only so many records of a list or archive; a folder is always taken whole.

    Raises:
        ValueError: no usable source, or not one of its candidates could be had; one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A folder is never cut to its `first` files: its table of names and digests exists already, so
    # the whole costs no reading, and duplicates are only right over all of it.
    if settings.kind == "folder":
        if listing is None:
            raise ValueError("listing: None; a folder's photographs come from its table")
        return _scan(settings, folder, listing, root)
    return _collect_records(settings, folder, root, state_dir, originals_uri, first)


def _scan(settings: IngestSettings, folder: Path, listing: Path, root: Path) -> Collected:
    manifest, remark = manifest_of_folder(read_listing(listing), settings, root)
    write_table(manifest, folder / "manifest.parquet")
    write_empty_side_tables(folder)
    coverage = table_coverage(manifest)
    coverage.remark = remark
    _write_coverage(coverage, folder)
    # Of an earlier run over another kind of source: the manifest names none of them any more.
    prune_originals(folder / "originals", keep=())
    return Collected(
        candidates=len(manifest),
        kept=len(manifest),
        unreadable=int((manifest["integrity"] != "ok").sum()),
        duplicates=int(manifest["duplicate_of"].notna().sum()),
        megapixels=float(manifest["megapixels"].sum()),
        remark=remark,
    )


def _collect_records(
    settings: IngestSettings,
    folder: Path,
    root: Path,
    state_dir: Path,
    originals_uri: str,
    first: int | None,
) -> Collected:
    """Read records, get their images, write the tables."""
    source = root / settings.source
    originals = folder / "originals"
    # In the state, not among the outputs: nothing downstream reads it, and six million rows of it
    # need not be cached.
    candidates = state_dir / "candidates.parquet"
    from_web = settings.kind in ("urls", "multiaspect")
    # What an address gave outlives changes of settings and code; archives are read again.
    journal_dir = root / "runs" / "downloads" if from_web else state_dir
    with DownloadJournal(
        journal_dir / "journal.sqlite", _fingerprint(settings.download)
    ) as journal:
        if settings.kind == "urls":
            records = read_url_lists(source, settings.source, settings.lists)
        elif settings.kind == "multiaspect":
            records = read_metadata_shards(source, settings.source, settings.lists)
        else:
            records = read_webdataset(
                source, settings.source, originals, journal, settings.download
            )
        unread = files_not_read(source, _ENDINGS[settings.kind])
        items = records if unread is None else chain(unread[:1], records)
        coverage = write_candidates(
            track(first_records(items, first), "ingest: records"),
            candidates,
            keyed_by_url=from_web,
        )
        if from_web:
            _download(settings.download, candidates, originals, journal, root)
        counts = write_ingest_tables(candidates, journal, folder, originals_uri, settings)
    # After the tables: until then a killed run would lose bytes that a row may still point at.
    prune_originals(originals, counts.originals)
    coverage.remark = None if unread is None else unread[1]
    coverage.kept, coverage.losses = counts.kept, counts.losses
    _write_coverage(coverage, folder)
    losses = counts.losses
    collected = Collected(
        candidates=counts.candidates,
        kept=counts.kept,
        unreadable=counts.unreadable,
        duplicates=sum(losses.get(name, 0) for name in ("duplicate_url", "duplicate_bytes")),
        megapixels=counts.megapixels,
        losses=losses,
        remark=coverage.remark,
    )
    # After all tables are written: the losses are what a person has to read now.
    if counts.kept == 0:
        raise ValueError(_why_nothing(collected, settings.source, folder))
    return collected


def first_records(items: Iterable[SourceItem], count: int | None) -> Iterator[SourceItem]:
    """The first records and losses, and the counts of files that were read to their end for them.

    Nothing is asked of the source after the last of them: what follows may be another archive.

    Args:
        items: of a reader.
        count: records and losses; None: all.
    """
    left = count
    for item in items if left != 0 else ():
        yield item
        if left is not None and isinstance(item, SourceRecord):
            left -= 1
            if not left:
                return


def _why_nothing(collected: Collected, source: str, folder: Path) -> str:
    """One line about a source of which nothing came."""
    if collected.candidates == 0:
        return f"{source} holds no record: its files are empty, or have a heading and nothing else"
    with pq.ParquetFile(folder / "losses.parquet") as file:
        (first,) = next(file.iter_batches(batch_size=1)).to_pylist()
    return (
        f"none of {collected.candidates} candidates of {source} could be had "
        f"({collected.described_losses}); the first, {first['record']}: "
        f"{first['detail'] or first['cause']}; data/ingest/losses.parquet lists each"
    )


def _download(
    settings: DownloadSettings,
    candidates: Path,
    originals: Path,
    journal: DownloadJournal,
    root: Path,
) -> None:
    # An original that `corpus pack` has moved into the store is there, and is not fetched again.
    packed = ImageStore(root / FOLDER)
    pending = pending_keys(candidates, journal, originals, packed)
    state = DownloadProgress(0, len(pending), 0, 0, 0.0)

    def note() -> str:
        return f"{state.images_per_s:.1f} images/s, {state.mb_per_s:.1f} MB/s, {state.kept} kept"

    bar: Iterator[int] = track(range(len(pending)), "ingest: downloads", note=note)
    # The first step of a bar stands for work begun, the next ones for work done.
    next(bar, None)

    def report(progress: DownloadProgress) -> None:
        nonlocal state
        state = progress
        next(bar, None)

    # Only what is pending: the journal answers for the rest, also for what a killed run fetched.
    Downloader(settings, originals).run(pending, journal, report)


def _fingerprint(settings: DownloadSettings) -> str:
    """Names the settings in the journal: a failure under others may be none under these."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_coverage(coverage: Coverage, folder: Path) -> None:
    text = json.dumps(coverage.report(), indent=2, ensure_ascii=False)
    write_text(folder / "coverage.json", text + "\n")
