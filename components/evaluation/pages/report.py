"""One self-contained HTML page about a run: no network, works from a file, light and dark.

Everything variable goes through the template engine's escaping; only our own style sheet, script
and charts are trusted. The page holds no dates and no machine paths, so equal inputs give equal
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from components.evaluation.measuring.twin_scores import Twin
from components.evaluation.pages.report_page import (
    RULE_NAMES,
    SCRIPTS,
    STYLES,
    Cell,
    ImageRow,
    ImageTable,
    Row,
    Table,
    Tile,
    assets,
    column_name,
    environment,
    fixed,
    published_rows,
)
from components.evaluation.pages.report_sources import (
    Corpus,
    read_contract,
    read_corpus,
    read_crops,
    read_figures,
    read_samples,
    read_twin_groups,
)
from components.evaluation.statistics import scores
from components.evaluation.viewer import EmbeddedPictures
from components.metrics.cards import CARDS, card, status
from components.metrics.paper_tables import paper_table, table_of_suite
from components.settings.schema import Settings

CARD_LIMIT = 60
"""Photographs shown per verdict."""
CROP_LIMIT = 12
SAMPLE_LIMIT = 60
ROW_LIMIT = 500

SYSTEM_NAMES = {
    scores.RECONSTRUCTION_BEFORE: "base autoencoder",
    scores.RECONSTRUCTION_AFTER: "trained autoencoder",
    scores.GENERATED: "generated",
    scores.PHOTOGRAPHS: "held-out photographs",
}
_IMAGE_KEYS = ["system", "image", "height", "width"]
_DETAIL_METRICS = (
    "glcm_score",
    "compression_ratio",
    "entropy_bits",
    "flat_fraction",
    "laplacian_variance",
    "colourfulness",
)


def _estimate_cell(table: pd.DataFrame, system: str, metric: str, settings: Settings) -> Cell:
    rows = table[table["system"] == system]
    value = scores.set_value(rows, metric)
    estimate = scores.mean_estimate(
        table,
        system,
        metric,
        resamples=settings.evaluate.bootstrap_resamples,
        seed=settings.project.seed,
    )
    if estimate is None:
        return Cell(fixed(value, metric))
    return Cell(
        fixed(value, metric), f"{fixed(estimate.low, metric)} to {fixed(estimate.high, metric)}"
    )


def _vae_table(table: pd.DataFrame, settings: Settings) -> Table:
    source = paper_table("reconstruction")
    metrics = source.metrics
    rows = published_rows(source)
    ours = [
        (scores.RECONSTRUCTION_BEFORE, "this run, before"),
        (scores.RECONSTRUCTION_AFTER, "this run, after"),
    ]
    for index, (system, name) in enumerate(ours):
        count = table.loc[table["system"] == system, "image"].nunique()
        cells = tuple(_estimate_cell(table, system, metric, settings) for metric in metrics)
        rows.append(Row(f"{name} (n = {count})", cells, first_ours=index == 0))
    return Table(
        "Reconstruction with F16 autoencoders. Published: Aesthetic-4K@4096 evaluation set; ours: "
        "held-out photographs at their bucket size",
        source.source,
        "Autoencoder",
        source.columns,
        tuple(rows),
    )


def _detail_table(table: pd.DataFrame) -> Table:
    columns = tuple(column_name(m) for m in _DETAIL_METRICS)
    detail = table_of_suite("detail")
    assert detail is not None
    extra = len(columns) - len(detail.columns)
    rows = published_rows(detail, extra)
    first = True
    for system in (scores.GENERATED, scores.PHOTOGRAPHS):
        ours = table[(table["system"] == system)]
        for (height, width), stratum in ours.groupby(["height", "width"], sort=True):
            cells = tuple(Cell(fixed(scores.set_value(stratum, m), m)) for m in _DETAIL_METRICS)
            count = stratum["image"].nunique()
            name = f"{SYSTEM_NAMES[system]}, {width} × {height} (n = {count})"
            rows.append(Row(name, cells, first_ours=first))
            first = False
    return Table(
        "Fine detail and other weight-free metrics, by aspect ratio (width × height). Photographs "
        "are held-out ones at the same sizes",
        detail.source,
        "Images",
        columns,
        tuple(rows),
    )


def _text_to_image_table(table: pd.DataFrame) -> Table:
    source = paper_table("main")
    rows = published_rows(source)
    count = table.loc[table["system"] == scores.GENERATED, ["image"]].nunique().iloc[0]
    ours = table[table["system"] == scores.GENERATED]
    cells = tuple(Cell(fixed(scores.set_value(ours, metric), metric)) for metric in source.metrics)
    rows.append(Row(f"this run (n = {count})", cells, first_ours=True))
    return Table(source.caption, source.source, "Model", source.columns, tuple(rows))


def _image_table(title: str, table: pd.DataFrame) -> ImageTable:
    present = set(table["metric"])
    metrics = [c for c in CARDS if c.id in present]
    rows = []
    groups = table.groupby(_IMAGE_KEYS, sort=True)
    for _, group in groups:
        system, image, height, width = (group[name].iloc[0] for name in _IMAGE_KEYS)
        values = dict(zip(group["metric"], group["value"], strict=True))
        measured = [(c.id, float(values.get(c.id, math.nan))) for c in metrics]
        cells = tuple(
            (value, fixed(value, name)) if math.isfinite(value) else (None, "–")
            for name, value in measured
        )
        shown = Path(image).stem if system == scores.GENERATED else image[:12]
        rows.append(
            ImageRow(shown, SYSTEM_NAMES.get(system, system), int(height), int(width), cells)
        )
    order = list(SYSTEM_NAMES.values())
    rows.sort(key=lambda row: order.index(row.system) if row.system in order else len(order))
    columns = tuple(column_name(c.id) for c in metrics)
    return ImageTable(title, columns, tuple(rows[:ROW_LIMIT]), len(rows))


def _image_tables(table: pd.DataFrame) -> list[ImageTable]:
    pairs = table["metric"].map(lambda metric: card(metric).needs == "pair").astype(bool)
    tables = [
        _image_table("Reconstructions", table[pairs]),
        _image_table("Generated images and photographs", table[~pairs]),
    ]
    return [part for part in tables if part.rows]


def _tiles(corpus: Corpus, metrics: Mapping[str, float], table: pd.DataFrame) -> list[Tile]:
    tiles = []
    candidates = corpus.accepted_total + corpus.rejected_total
    if candidates:
        tiles.append(Tile("Photographs accepted", f"{corpus.accepted_total} of {candidates}", ""))
    before = metrics.get(f"{scores.RECONSTRUCTION_BEFORE}_psnr_db")
    after = metrics.get(f"{scores.RECONSTRUCTION_AFTER}_psnr_db")
    if before is not None and after is not None:
        gain = f"{metrics['vae_psnr_gain_db']:+.2f} dB on held-out images"
        tiles.append(Tile("Autoencoder PSNR, dB", f"{before:.2f} → {after:.2f}", gain))
    drop = metrics.get("validation_loss_drop")
    if drop is not None:
        # Not -0.0.
        change = round(-100 * drop, 1) + 0.0
        tiles.append(Tile("Transformer, held-out loss", f"{change:+.1f} %", "both stages"))
    by_heart = metrics.get("training_images_loss_drop")
    if by_heart is not None:
        tiles.append(
            Tile(
                "Transformer, training images", f"{-100 * by_heart:+.1f} %", "stage 1, fixed noise"
            )
        )
    if "twins" in metrics:
        count = f"{metrics['twins_recognised']:.0f} of {metrics['twins']:.0f}"
        tiles.append(
            Tile("Twins recognised", count, f"worst {metrics['twin_psnr_db_worst']:.1f} dB")
        )
    generated = table.loc[table["system"] == scores.GENERATED]
    if not generated.empty:
        sizes = generated[["height", "width"]].drop_duplicates().shape[0]
        tiles.append(
            Tile("Images generated", str(generated["image"].nunique()), f"{sizes} aspect ratios")
        )
    return tiles


def _gain_text(metrics: Mapping[str, float]) -> str:
    gain = metrics.get("vae_psnr_gain_db")
    if gain is None:
        return ""
    text = f"Paired PSNR gain of the post-trained decoder: {gain:+.2f} dB"
    low, high = metrics.get("vae_psnr_gain_db_low"), metrics.get("vae_psnr_gain_db_high")
    return f"{text} ({low:+.2f} to {high:+.2f})." if low is not None else f"{text} (one image)."


def build_report(
    root: Path,
    settings: Settings,
    *,
    table: pd.DataFrame,
    metrics: Mapping[str, float],
    decision: Mapping[str, Any],
    twins: Sequence[Twin] = (),
) -> str:
    """The whole page.

    Args:
        root: repository root; stage outputs are read from `data/`, weights looked for in
            `weights/`.
        settings: all settings.
        table: `scores_table` of this run.
        metrics: flat numbers of `metrics.json`.
        decision: what `components.evaluation.statistics.gate.decide` returned.
        twins: pictures from training captions, scored.

    Returns:
        HTML text. Outputs that do not exist yet leave their section out.
    """
    data_dir = root / "data"
    image_px = settings.evaluate.report_image_px
    corpus = read_corpus(data_dir, CARD_LIMIT)
    contract = read_contract(data_dir)
    figures = [
        {"title": figure.title, "svg": Markup(figure.svg)} for figure in read_figures(data_dir)
    ]
    embedded = EmbeddedPictures()
    crops = read_crops(data_dir, CROP_LIMIT, embedded)
    samples = read_samples(data_dir, image_px, SAMPLE_LIMIT)
    twin_groups = read_twin_groups(data_dir, twins[:SAMPLE_LIMIT], image_px)
    measured = set(table.loc[table["value"].notna(), "metric"])
    per_image = _image_tables(table)
    sections = [
        ("summary", "Summary", True),
        ("twins", "Photographs and twins", bool(twin_groups)),
        ("samples", "Samples", bool(samples)),
        ("corpus", "Corpus", bool(corpus.accepted_total or corpus.rejected_total)),
        ("contract", "Contract", contract is not None),
        ("training", "Training", bool(figures)),
        ("autoencoder", "Autoencoder", bool(crops.items)),
        ("metrics", "Metrics", True),
        ("images", "Per image", bool(per_image)),
        ("cards", "Metric cards", True),
        ("lineage", "Lineage", True),
    ]
    counts = table.groupby("system")["image"].nunique()
    smallest = int(counts.min()) if len(counts) else 0
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=f"{settings.project.name}: run report",
            profile=settings.project.profile,
            is_tiny=settings.models.autoencoder.pretrained is None,
            seed=settings.project.seed,
            css=assets(STYLES),
            js=assets(SCRIPTS),
            sections=[(key, name) for key, name, shown in sections if shown],
            tiles=_tiles(corpus, metrics, table),
            decision=decision,
            rule_names=RULE_NAMES,
            corpus=corpus,
            contract=contract,
            figures=figures,
            crops=crops.items,
            viewer=crops.as_json(),
            blocks=embedded.blocks,
            samples=samples,
            twins=twin_groups,
            tables=[_vae_table(table, settings), _text_to_image_table(table), _detail_table(table)],
            gain_text=_gain_text(metrics),
            small_sample=smallest if smallest < 30 else 0,
            resamples=settings.evaluate.bootstrap_resamples,
            image_tables=per_image,
            cards=[(c, status(c, measured, root / "weights")) for c in CARDS],
            metrics=dict(metrics),
        )
    )
