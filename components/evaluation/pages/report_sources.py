"""What the report shows, read from the outputs of the stages below `data/`.

Each reader returns plain values. An output that does not exist gives an empty section, never an
error: a report over half a run is still a report.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.evaluation.measuring.twin_scores import Twin
from components.evaluation.pages.charts import Series, line_chart
from components.evaluation.pages.pictures import clean_png, picture_uri, thumbnail_uri
from components.evaluation.viewer import (
    EmbeddedPictures,
    Layer,
    ViewedItem,
    ViewedPicture,
    Viewer,
)
from components.generation.generation_list import read_generations
from components.generation.twins import LIST, TRAINED, TWINS

_THUMBNAIL_PX = 320
_SMOOTHING = 0.9
CROP_SYSTEMS = {"original": "original", "before": "base decoder", "after": "trained decoder"}
"""Ending of the crop's file name to what the page calls it."""
_NO_SERIES_COLUMNS = frozenset({"step", "epoch", "learning_rate", "lr"})


@dataclass(frozen=True)
class Photograph:
    """One candidate on a card."""

    name: str
    picture: str
    width: int
    height: int
    kept: bool
    split: str
    reject: str
    facts: tuple[tuple[str, str], ...]
    caption_en: str
    caption_zh: str
    attribution: str


@dataclass(frozen=True)
class Corpus:
    """Cards and counts; `shown` may be fewer than the totals."""

    accepted: tuple[Photograph, ...] = ()
    rejected: tuple[Photograph, ...] = ()
    accepted_total: int = 0
    rejected_total: int = 0
    reasons: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Expectation:
    """One line of the data contract's result."""

    name: str
    severity: str
    status: str
    """passed, failed or skipped."""
    detail: str


@dataclass(frozen=True)
class Contract:
    """Result of the validate stage."""

    success: bool
    expectations: tuple[Expectation, ...]
    page: str
    """Relative link to its own page; empty when there is none."""


@dataclass(frozen=True)
class Figure:
    """A drawn chart."""

    title: str
    svg: str


@dataclass(frozen=True)
class Sample:
    """A generated image."""

    picture: str
    prompt: str
    seed: int
    height: int
    width: int
    sha256: str


@dataclass(frozen=True)
class SampleGroup:
    """All sizes of one prompt."""

    prompt: str
    samples: tuple[Sample, ...] = field(default=())


def number(value: Any, digits: int = 4) -> str:
    """A number for a reader: `digits` significant ones, a dash where there is none."""
    if value is None or isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) and value else "–"
    real = float(value)
    if not math.isfinite(real):
        return "∞" if real > 0 else "–"
    if real == int(real):
        return f"{int(real):,}"
    text = f"{real:.{digits}g}"
    return f"{real:.0f}" if "e+" in text else text


def _text(row: Mapping[Any, Any], column: str) -> str:
    value = row.get(column)
    return "" if value is None or (not isinstance(value, str) and pd.isna(value)) else str(value)


def _derivatives(path: Path, wanted: list[str]) -> dict[str, bytes]:
    """JPEG bytes by image id, only those `wanted` (the table may be large)."""
    if not path.exists() or not wanted:
        return {}
    names = pq.read_schema(path).names
    column = next(name for name in ("jpeg", "jpeg_bytes", "bytes") if name in names)
    table: pa.Table = pq.read_table(
        path, columns=["image_id", column], filters=[("image_id", "in", wanted)]
    )
    return dict(zip(table["image_id"].to_pylist(), table[column].to_pylist(), strict=True))


_FACTS = (
    ("flat_fraction", "flat"),
    ("entropy_bits", "entropy"),
    ("quality_score", "quality"),
    ("aesthetic", "aesthetic"),
    ("person_count", "people"),
)


def _photograph(row: Mapping[Any, Any], jpeg: bytes | None, split: str) -> Photograph:
    picture = ""
    if jpeg:
        with Image.open(io.BytesIO(jpeg)) as image:
            picture = thumbnail_uri(image, _THUMBNAIL_PX)
    reject = ""
    if not row["kept"]:
        reject = _text(row, "reject_reason").replace("_", " ") or "rejected"
        value, threshold = row.get("reject_value"), row.get("reject_threshold")
        if not pd.isna(value):
            reject += f": {number(value)}"
            reject += "" if pd.isna(threshold) else f" against {number(threshold)}"
    credits = [_text(row, column) for column in ("photographer", "license")]
    # 0 stands for a file whose header could not be read.
    height, width = (0 if pd.isna(row[c]) else int(row[c]) for c in ("height", "width"))
    return Photograph(
        name=Path(_text(row, "uri")).name or _text(row, "image_id")[:12],
        picture=picture,
        width=width,
        height=height,
        kept=bool(row["kept"]),
        split=split,
        reject=reject,
        facts=tuple(
            (label, number(row[column], 3))
            for column, label in _FACTS
            if column in row and not pd.isna(row[column])
        ),
        caption_en=_text(row, "caption_en"),
        caption_zh=_text(row, "caption_zh"),
        attribution=", ".join(credit for credit in credits if credit),
    )


def read_corpus(data_dir: Path, limit: int) -> Corpus:
    """Cards of at most `limit` accepted and `limit` rejected candidates, in order of file name."""
    manifest = data_dir / "caption" / "manifest.parquet"
    if not manifest.exists():
        return Corpus()
    table = pd.read_parquet(manifest)
    table = table.sort_values(["uri", "image_id"], kind="stable", ignore_index=True)
    # A row that no rule has judged (an unreadable file) is not kept.
    table["kept"] = kept = table["kept"].map(lambda value: value is True or value == 1)
    chosen = [table[kept].head(limit), table[~kept].head(limit)]
    ids = [str(value) for part in chosen for value in part["image_id"]]
    jpegs = _derivatives(data_dir / "signals" / "derivatives.parquet", ids)
    splits: dict[str, str] = {}
    sliced = data_dir / "slices" / "manifest.parquet"
    if sliced.exists() and "split" in pq.read_schema(sliced).names:
        rows = pd.read_parquet(sliced, columns=["image_id", "split"])
        splits = dict(zip(rows["image_id"].astype(str), rows["split"].astype(str), strict=True))
    accepted, rejected = (
        tuple(
            _photograph(row, jpegs.get(row["image_id"]), splits.get(str(row["image_id"]), ""))
            for row in part.to_dict("records")
        )
        for part in chosen
    )
    reasons = table.loc[~kept, "reject_reason"].fillna("rejected").value_counts()
    return Corpus(
        accepted,
        rejected,
        int(kept.sum()),
        int((~kept).sum()),
        tuple(sorted(((str(k), int(v)) for k, v in reasons.items()), key=lambda r: (-r[1], r[0]))),
    )


def read_contract(data_dir: Path) -> Contract | None:
    """Result of the validate stage, None before it ran."""
    path = data_dir / "validate" / "results.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    page = data_dir / "validate" / "report.html"
    return Contract(
        success=bool(result["success"]),
        expectations=tuple(_expectation(entry) for entry in result["expectations"]),
        page="../validate/report.html" if page.exists() else "",
    )


def _expectation(entry: Mapping[str, Any]) -> Expectation:
    kind = str(entry["expectation"]).removeprefix("expect_").replace("_", " ")
    column = entry.get("column")
    detail = str(entry.get("why") or "")
    if entry["status"] == "failed":
        found = entry.get("observed") or f"{entry['unexpected']} of {entry['checked']} rows"
        detail = f"{found}; {detail}" if detail else str(found)
    return Expectation(
        name=f"{column}: {kind}" if column else kind,
        severity=str(entry["severity"]),
        status=str(entry["status"]),
        detail=detail,
    )


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average with bias correction."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(mean / weight)
    return out


def _columns(table: pd.DataFrame, wanted: str) -> list[str]:
    return [
        str(name)
        for name in table.columns
        if wanted in str(name)
        and "_band_" not in str(name)
        and name not in _NO_SERIES_COLUMNS
        and pd.api.types.is_numeric_dtype(table[name])
    ]


def _history_figures(path: Path, title: str) -> list[Figure]:
    """Loss curves (smoothed when long) and PSNR curves of a training history."""
    if not path.exists():
        return []
    table = pd.read_csv(path)
    if "step" not in table.columns:
        return []
    figures: list[Figure] = []
    for wanted, label, log in (("loss", "loss", True), ("psnr", "PSNR (dB)", False)):
        series: list[Series] = []
        for name in _columns(table, wanted):
            rows = table[["step", name]].dropna()
            x, y = rows["step"].tolist(), rows[name].astype(float).tolist()
            shown = name.replace("_", " ")
            if wanted == "loss" and len(y) > 40 and name == "loss":
                series.append(Series("each step", x, y, faint=True))
                series.append(Series("smoothed", x, _smooth(y)))
            else:
                series.append(Series(shown, x, y))
        svg = line_chart(series, x_label="step", y_label=label, log_y=log)
        if svg:
            figures.append(Figure(f"{title}: {label}", svg))
    return figures


def _validation_figure(path: Path, title: str) -> list[Figure]:
    """Validation loss over steps, one line per noise level t (0 data, 1 noise)."""
    if not path.exists():
        return []
    table = pd.read_csv(path)
    if not {"step", "level", "loss"} <= set(table.columns):
        return []
    if "weights" in table.columns:
        # One curve per level: of the weights as trained, not of their moving average.
        table = table[table["weights"] == "raw"]
    series = []
    for level, rows in table.groupby("level", sort=True):
        name = f"t = {number(level, 3)}" if not isinstance(level, str) else str(level)
        ordered = rows.sort_values("step")
        series.append(Series(name, ordered["step"].tolist(), ordered["loss"].tolist()))
    svg = line_chart(series, x_label="step", y_label="validation loss", log_y=True)
    return [Figure(f"{title}: validation loss by noise level", svg)] if svg else []


def read_figures(data_dir: Path) -> list[Figure]:
    """Training curves of the autoencoder and of both transformer stages."""
    figures = _history_figures(data_dir / "vae" / "history.csv", "Autoencoder")
    for stage in (1, 2):
        folder = data_dir / f"dit_stage{stage}"
        figures += _history_figures(folder / "history.csv", f"Transformer, stage {stage}")
        figures += _validation_figure(folder / "validation.csv", f"Transformer, stage {stage}")
    return figures


def read_crops(data_dir: Path, limit: int, embedded: EmbeddedPictures) -> Viewer:
    """Before/after crops of the vae stage, at their native pixels.

    Args:
        data_dir: where the stages write.
        limit: crops at most.
        embedded: receives the pictures.
    """
    folder = data_dir / "vae" / "crops"
    items: list[ViewedItem] = []
    for original in sorted(folder.glob("*_original.png"))[:limit]:
        name = original.name.removesuffix("_original.png")
        paths = {system: folder / f"{name}_{kind}.png" for kind, system in CROP_SYSTEMS.items()}
        if not all(path.exists() for path in paths.values()):
            continue
        pictures = {}
        for system, path in paths.items():
            with Image.open(path) as image:
                width, height = image.size
            picture = embedded.add(clean_png(path), "image/png")
            layer = Layer(0, 0, height, width, picture)
            pictures[system] = ViewedPicture(height, width, (layer,), picture)
        items.append(ViewedItem(name, f"Held-out crop {name}", pictures))
    return Viewer(tuple(CROP_SYSTEMS.values()), items)


@dataclass(frozen=True)
class TwinGroup:
    """A photograph of the training set and what its caption gives."""

    name: str
    photograph: str
    """Picture of it."""
    twin: Sample
    others: tuple[Sample, ...]
    psnr_db: float
    is_nearest: bool


def _sample(row: Mapping[str, Any], folder: Path, long_edge_px: int) -> Sample:
    """A line of what the stage `generate` lists, with its picture from `folder`."""
    return Sample(
        picture_uri(folder / Path(row["file"]).name, long_edge_px),
        row["prompt"],
        int(row["seed"]),
        int(row["height"]),
        int(row["width"]),
        row["image_sha256"],
    )


def read_twin_groups(
    data_dir: Path, twins: Sequence[Twin], long_edge_px: int
) -> tuple[TwinGroup, ...]:
    """The scored twins with their photographs and their other sizes, in their order.

    Args:
        data_dir: where the stages write.
        twins: from `twin_scores`.
        long_edge_px: of a picture.
    """
    if not twins:
        return ()
    rows = read_generations(data_dir.parent / TWINS / LIST)
    trained = pd.read_parquet(data_dir.parent / TRAINED, columns=["image_id", "uri"])
    uris = trained.set_index("image_id")["uri"]
    jpegs = _derivatives(
        data_dir / "signals" / "derivatives.parquet", [twin.image_id for twin in twins]
    )

    folder = data_dir / "generate" / "twins"
    groups = []
    for twin in twins:
        made = [
            _sample(row, folder, long_edge_px)
            for row in rows
            if row["source_image_id"] == twin.image_id
        ]
        photograph = ""
        if twin.image_id in jpegs:
            with Image.open(io.BytesIO(jpegs[twin.image_id])) as image:
                photograph = thumbnail_uri(image, _THUMBNAIL_PX)
        groups.append(
            TwinGroup(
                Path(str(uris[twin.image_id])).name,
                photograph,
                made[0],
                tuple(made[1:]),
                twin.psnr_db,
                twin.is_nearest,
            )
        )
    return tuple(groups)


def read_samples(data_dir: Path, long_edge_px: int, limit: int) -> list[SampleGroup]:
    """Generated images, grouped by prompt in the order of `generations.jsonl`."""
    rows = read_generations(data_dir / "generate" / "generations.jsonl")
    groups: dict[str, list[Sample]] = {}
    for row in rows[:limit]:
        sample = _sample(row, data_dir / "generate" / "images", long_edge_px)
        groups.setdefault(sample.prompt, []).append(sample)
    return [SampleGroup(prompt, tuple(samples)) for prompt, samples in groups.items()]
