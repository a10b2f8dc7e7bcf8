"""Stage `slices`: hold images out and cut the tables that training reads."""

from __future__ import annotations

import json

from components.corpus.manifest_columns import read_columns
from components.corpus.manifest_copies import copy_manifest
from components.corpus.pages import datasheet
from components.corpus.pages.overview_figure import save_overview
from components.corpus.pages.page_figures import write_page
from components.corpus.selection.attribution import write_attribution
from components.corpus.selection.slices import COLUMNS, SLICES, slice_rows, split
from components.files.whole_files import write_text
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write tables, attribution, pages and numbers of the slices to `data/slices/`.

    Raises:
        StageFailed: every kept image is held out, so that none is left to train on.
    """
    settings = context.settings.slices
    captioned = context.input("caption", "manifest.parquet")
    seed = context.settings.project.seed
    manifest = read_columns(captioned, (*COLUMNS, *datasheet.COLUMNS), presence=datasheet.PRESENCE)
    manifest["split"] = split(manifest, settings, seed)
    rows = slice_rows(manifest, settings, seed)
    if not len(rows["stage1"]):
        raise StageFailed(
            f"slices: {len(rows['eval'])} kept images are all held out for evaluation and none "
            f"is left for training; add photographs or lower slices.eval_min_images "
            f"({settings.eval_min_images}) or slices.eval_fraction ({settings.eval_fraction})"
        )
    folder = context.output_dir
    tables = {folder / f"{name}.parquet": rows[name] for name in SLICES}
    copy_manifest(captioned, manifest[["split"]], {folder / "manifest.parquet": None, **tables})
    counts = {name: len(rows[name]) for name in SLICES}
    counts["buckets"] = int(manifest.loc[manifest["kept"].eq(True), "bucket"].nunique())
    write_attribution(captioned, {name: rows[name] for name in SLICES}, folder / "attribution")
    summary = folder / "summary.json"
    write_text(summary, json.dumps(counts, indent=2) + "\n")
    figure = folder / "overview.png"
    save_overview(manifest, context.settings.select, figure)
    coverage = json.loads(context.input("ingest", "coverage.json").read_text(encoding="utf-8"))
    page = folder / "datasheet.html"
    lengths = json.loads(context.input("caption", "text_lengths.json").read_text(encoding="utf-8"))
    write_page(datasheet.datasheet_page(manifest, rows, coverage, lengths), page)
    return StageResult(
        metrics={name: float(number) for name, number in counts.items()},
        artifacts=(summary, figure, page),
        datasets={name: folder / f"{name}.parquet" for name in ("manifest", *SLICES)},
        summary=", ".join(f"{name} {number}" for name, number in counts.items()),
    )
