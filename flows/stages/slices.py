"""Stage `slices`: hold images out and cut the tables that training reads."""

from __future__ import annotations

import json

from components.corpus.manifest import read_table, write_table
from components.corpus.pages.datasheet import datasheet_page
from components.corpus.pages.overview_figure import save_overview
from components.corpus.pages.page_figures import write_page
from components.corpus.selection.slices import SLICES, slices, split
from components.files.whole_files import write_text
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write to `data/slices/` the manifest, a table per slice, summary, overview and datasheet.

    Raises:
        StageFailed: every kept image is held out, so that none is left to train on.
    """
    settings = context.settings.slices
    manifest = read_table(context.input("caption", "manifest.parquet"))
    seed = context.settings.project.seed
    manifest["split"] = split(manifest, settings, seed)
    tables = slices(manifest, settings, seed)
    if tables["stage1"].empty:
        raise StageFailed(
            f"slices: {len(tables['eval'])} kept images are all held out for evaluation and none "
            f"is left for training; add photographs or lower slices.eval_min_images "
            f"({settings.eval_min_images}) or slices.eval_fraction ({settings.eval_fraction})"
        )
    folder = context.output_dir
    write_table(manifest, folder / "manifest.parquet")
    for name in SLICES:
        write_table(tables[name], folder / f"{name}.parquet")
    counts = {name: len(tables[name]) for name in SLICES}
    counts["buckets"] = int(manifest.loc[manifest["kept"].eq(True), "bucket"].nunique())
    summary = folder / "summary.json"
    write_text(summary, json.dumps(counts, indent=2) + "\n")
    figure = folder / "overview.png"
    save_overview(manifest, context.settings.select, figure)
    datasheet = folder / "datasheet.html"
    write_page(datasheet_page(manifest, tables), datasheet)
    return StageResult(
        metrics={name: float(number) for name, number in counts.items()},
        artifacts=(summary, figure, datasheet),
        datasets={name: folder / f"{name}.parquet" for name in ("manifest", *SLICES)},
        summary=", ".join(f"{name} {number}" for name, number in counts.items()),
    )
