"""Stage `select`: join every signal and apply the selection rules."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet as pq

from components.corpus.bucket_columns import assign_buckets
from components.corpus.duplicates import mark_near_duplicates
from components.corpus.manifest import read_table, write_table
from components.corpus.quotas import QuotaInfeasible
from components.corpus.selection import REASONS, SETTING_OF, count_by_reason, select
from components.corpus.settings import SelectSettings
from components.training.aspect_buckets import buckets
from components.whole_files import write_text
from flows.stages.contract import StageContext, StageFailed, StageResult
from flows.stages.gate import check_manifest, joined

# What each stage measures; a table made with a model or measurement switched off has fewer columns.
_SIGNALS = [
    "flat_fraction",
    "entropy_bits",
    "glcm_score",
    "glcm_entropy_bits",
    "jpeg_quality",
    "pdq_hash",
    "pdq_quality",
]
_QUALITY = [
    "quality_score",
    "quality_scorer",
    "quality_weights",
    "aesthetic",
    "aesthetic_scorer",
    "aesthetic_weights",
]
_PEOPLE = [
    "person_count",
    "person_boxes",
    "person_scorer",
    "person_weights",
    "is_character",
    "channel",
    "nsfw_score",
    "nsfw_scorer",
    "nsfw_weights",
]


def _join(manifest: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Replace `columns` by those of `other`; duplicates of one image share its values."""
    columns = [column for column in columns if column in other]
    return manifest.drop(columns=columns).merge(
        other[["image_id", *columns]], on="image_id", how="left", validate="many_to_one"
    )


def _signals(manifest: pd.DataFrame, signals: pd.DataFrame) -> pd.DataFrame:
    """Add signals; `integrity` becomes the first complaint of header, decoder or engine."""
    found = signals.assign(decoded=signals["error"].fillna(signals["integrity"]))
    joined = _join(manifest.assign(decoded=None), found, [*_SIGNALS, "decoded"])
    header_is_fine = joined["integrity"] == "ok"
    joined["integrity"] = joined["integrity"].where(~header_is_fine, joined["decoded"])
    return joined.drop(columns="decoded")


def _near_duplicates(manifest: pd.DataFrame, settings: SelectSettings) -> pd.DataFrame:
    """Add near_duplicate_of where hashes were computed and the rule is on."""
    distance = settings.near_duplicate_distance
    if distance is None or manifest["pdq_hash"].isna().all():
        return manifest
    # Rows that share their bytes share an image_id; the exact-duplicate rule has them already.
    distinct = manifest.drop_duplicates("image_id")
    marked = mark_near_duplicates(
        distinct, max_distance=distance, min_quality=settings.near_duplicate_min_quality
    )
    keeper = marked.set_index("image_id")["duplicate_of"]
    return manifest.assign(near_duplicate_of=manifest["image_id"].map(keeper))


def _nothing_kept(counts: dict[str, int]) -> str:
    """One line: what rejected everything and which setting decides it."""
    rejected = {reason: counts[f"rejected_{reason}"] for reason in REASONS}
    listed = ", ".join(f"{reason} {number}" for reason, number in rejected.items() if number)
    strictest = max(rejected, key=lambda reason: rejected[reason])
    return (
        f"select: none of {counts['candidates']} candidates passes ({listed}); "
        f"look at {SETTING_OF[strictest]} first"
    )


def run(context: StageContext) -> StageResult:
    """Write `data/select/manifest.parquet` and `data/select/summary.json`.

    The scored contract is checked last: contract_results.json, contract_report.html and
    contract_failed_rows.parquet say what it found.

    Raises:
        StageFailed: nothing is kept (both files are written all the same), quotas that cannot
            hold, or a critical expectation of the scored contract is violated.
    """
    manifest = read_table(context.input("ingest", "manifest.parquet"))
    signals = pq.read_table(context.input("signals", "signals.parquet")).to_pandas()
    quality = pq.read_table(context.input("quality", "quality.parquet")).to_pandas()
    people = pq.read_table(context.input("people", "people.parquet")).to_pandas()
    manifest = _signals(manifest, signals)
    manifest = _join(manifest, quality, _QUALITY)
    manifest = _join(manifest, people, _PEOPLE)
    # `qalign` is filled only by the model of that name.
    is_qalign = manifest["quality_scorer"].str.lower().str.startswith(("qalign", "q-align"))
    manifest["qalign"] = manifest["quality_score"].where(is_qalign.eq(True))
    manifest = _near_duplicates(manifest, context.settings.select)
    manifest = assign_buckets(manifest, buckets(context.settings.buckets))
    try:
        manifest = select(manifest, context.settings.select, context.settings.project.seed)
    except QuotaInfeasible as problem:
        raise StageFailed(f"select: {problem}") from None

    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)
    counts = count_by_reason(manifest)
    summary_path = context.output_dir / "summary.json"
    write_text(summary_path, json.dumps(counts, indent=2) + "\n")
    if counts["kept"] == 0:
        raise StageFailed(_nothing_kept(counts))
    result = StageResult(
        metrics={name: float(number) for name, number in counts.items()},
        artifacts=(summary_path,),
        datasets={"selection": path},
        summary=f"{counts['candidates']} candidates, {counts['kept']} kept",
    )
    checked = check_manifest(context, path, [context.settings.validation.scored], "contract_")
    return joined(result, checked)
