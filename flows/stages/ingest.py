"""Stage `ingest`: bring in the photographs that `ingest.source` names, from disk or the web."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from components.corpus.manifest import write_table
from components.corpus.sources.download_journal import DownloadJournal
from components.corpus.sources.downloader import Downloader, DownloadProgress
from components.corpus.sources.folder import scan_folder
from components.corpus.sources.ingest_tables import (
    IngestCounts,
    pending_keys,
    table_coverage,
    write_candidates,
    write_empty_side_tables,
    write_ingest_tables,
)
from components.corpus.sources.multiaspect import read_metadata_shards
from components.corpus.sources.originals import prune_originals
from components.corpus.sources.record_fields import Coverage
from components.corpus.sources.url_lists import read_url_lists
from components.corpus.sources.webdataset import read_webdataset
from components.files.whole_files import write_text
from components.images.image_store import FOLDER, ImageStore
from components.settings.corpus import DownloadSettings
from components.telemetry.progress import track
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.stages.gate import check_manifest, joined

URI_PREFIX = "data/ingest/originals"


def run(context: StageContext) -> StageResult:
    """Write the manifest and what is lost or unknown beside it.

    `data/ingest/` holds manifest.parquet (one row per candidate that is there), losses.parquet (one
    per candidate that is not), unknown_columns.parquet, coverage.json and originals/ (fetched or
    unpacked bytes; empty for a folder of photographs, which stay where they are). The raw contract
    is checked last: contract_results.json, contract_report.html and contract_failed_rows.parquet.

    Raises:
        StageFailed: no usable source; the line names it and the setting. Or nothing could be had,
            or a critical expectation of the raw contract is violated.
    """
    is_folder = context.settings.ingest.kind == "folder"
    try:
        result = _scan(context) if is_folder else _collect(context)
    except ValueError as problem:
        raise StageFailed(f"ingest: {problem}") from None
    manifest = context.output_dir / "manifest.parquet"
    checked = check_manifest(context, manifest, [context.settings.validation.raw], "contract_")
    return joined(result, checked)


def _scan(context: StageContext) -> StageResult:
    manifest = scan_folder(context.settings.ingest, context.root)
    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)
    write_empty_side_tables(context.output_dir)
    coverage_path = _write_coverage(table_coverage(manifest), context.output_dir)
    prune_originals(context.output_dir / "originals", keep=())
    unreadable = int((manifest["integrity"] != "ok").sum())
    duplicates = int(manifest["duplicate_of"].notna().sum())
    megapixels = float(manifest["megapixels"].sum()) if "megapixels" in manifest else 0.0
    return StageResult(
        metrics={
            "candidates": float(len(manifest)),
            "kept": float(len(manifest)),
            "losses": 0.0,
            "unreadable": float(unreadable),
            "duplicates": float(duplicates),
            "megapixels": megapixels,
        },
        artifacts=(coverage_path,),
        datasets={"candidates": path},
        summary=f"{len(manifest)} candidates, {unreadable} unreadable, {duplicates} duplicates",
    )


def _collect(context: StageContext) -> StageResult:
    """Read records, get their images, write the tables."""
    settings = context.settings.ingest
    source = context.root / settings.source
    folder = context.output_dir
    originals = folder / "originals"
    candidates = context.state_dir / "candidates.parquet"
    from_web = settings.kind in ("urls", "multiaspect")
    # What an address gave outlives changes of settings and code; archives are read again.
    journal_dir = context.root / "runs" / "downloads" if from_web else context.state_dir
    fingerprint = _fingerprint(settings.download)
    with DownloadJournal(journal_dir / "journal.sqlite", fingerprint) as journal:
        if settings.kind == "urls":
            records = read_url_lists(source, settings.source)
        elif settings.kind == "multiaspect":
            records = read_metadata_shards(source, settings.source)
        else:
            records = read_webdataset(
                source, settings.source, originals, journal, settings.download
            )
        coverage = write_candidates(
            track(records, "ingest: records"), candidates, keyed_by_url=from_web
        )
        if from_web:
            _download(context, candidates, originals, journal)
        counts = write_ingest_tables(candidates, journal, folder, URI_PREFIX, settings)
    prune_originals(originals, counts.originals)
    coverage_path = _write_coverage(coverage, folder)
    if counts.kept == 0:
        raise StageFailed(
            f"ingest: none of {counts.candidates} candidates of {settings.source} could be had "
            f"({_described(counts)}); data/ingest/losses.parquet lists each"
        )
    return StageResult(
        metrics=_metrics(counts),
        artifacts=(coverage_path,),
        datasets={"candidates": folder / "manifest.parquet", "losses": folder / "losses.parquet"},
        summary=f"{counts.candidates} candidates, {counts.kept} kept"
        + (f", lost: {_described(counts)}" if counts.losses else ""),
    )


def _download(
    context: StageContext, candidates: Path, originals: Path, journal: DownloadJournal
) -> None:
    packed = ImageStore(context.root / FOLDER)
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

    Downloader(context.settings.ingest.download, originals).run(pending, journal, report)


def _fingerprint(settings: DownloadSettings) -> str:
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_coverage(coverage: Coverage, folder: Path) -> Path:
    path = folder / "coverage.json"
    write_text(path, json.dumps(coverage.report(), indent=2, ensure_ascii=False) + "\n")
    return path


def _described(counts: IngestCounts) -> str:
    return ", ".join(f"{cause} {number}" for cause, number in counts.losses.items())


def _metrics(counts: IngestCounts) -> dict[str, float]:
    duplicates = sum(counts.losses.get(name, 0) for name in ("duplicate_url", "duplicate_bytes"))
    return {
        "candidates": float(counts.candidates),
        "kept": float(counts.kept),
        "losses": float(sum(counts.losses.values())),
        "unreadable": float(counts.unreadable),
        "duplicates": float(duplicates),
        "megapixels": counts.megapixels,
        **{f"lost_{cause}": float(number) for cause, number in counts.losses.items()},
    }
