"""Select, what-if, validate, slices, diff and drift over a synthetic manifest, a process per step.

    python benchmarks/corpus_scale.py --rows 1000000

Seconds are counted after imports and after reading the table; memory is the peak of the process,
the table included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.corpus.manifest import read_table, write_table  # noqa: E402
from components.corpus.selection.bucket_columns import assign_buckets  # noqa: E402
from components.images.aspect_buckets import buckets  # noqa: E402
from components.settings.corpus import AspectQuotaSettings, ShareSettings  # noqa: E402
from components.settings.schema import Settings, parse_settings  # noqa: E402

STEPS = (
    "select",
    "select_quotas",
    "what_if",
    "validate",
    "validate_kept",
    "slices",
    "datasheet",
    "diff",
    "drift",
)
# The synthetic manifest's columns; the rest of the schema stays null.
COLUMNS = 30


def synthetic_manifest(rows: int, seed: int) -> pd.DataFrame:
    """A plausible captioned manifest: `COLUMNS` filled columns, most candidates good."""
    rng = np.random.default_rng(seed)
    ids = [f"{n:016x}{seed:048x}" for n in rng.permutation(rows)]
    height = rng.integers(2160, 5000, rows)
    width = rng.integers(3840, 8000, rows)
    person = rng.random(rows) < 0.2

    def text(values: list[str]) -> np.ndarray:
        return np.array(values, dtype=object)[rng.integers(0, len(values), rows)]

    return pd.DataFrame(
        {
            "image_id": ids,
            "uri": [f"images/{image_id[:16]}.jpg" for image_id in ids],
            "width": width,
            "height": height,
            "megapixels": width * height / 1e6,
            "aspect_ratio": width / height,
            "format": "JPEG",
            "bytes_per_pixel": rng.uniform(0.1, 2.0, rows),
            "integrity": np.where(rng.random(rows) < 0.01, "truncated", "ok"),
            "flat_fraction": rng.beta(1, 3, rows),
            "entropy_bits": np.minimum(8.0, rng.normal(7.4, 0.3, rows)),
            "glcm_score": rng.normal(1.0, 0.2, rows),
            "jpeg_quality": rng.integers(70, 100, rows),
            "nsfw_score": rng.beta(1, 20, rows),
            "quality_score": rng.normal(4.2, 0.3, rows),
            "quality_scorer": "q-align",
            "aesthetic": rng.normal(55, 10, rows),
            "aesthetic_scorer": "artimuse",
            "person_count": person.astype(int),
            "is_character": person,
            "channel": np.where(person, "human", "general"),
            "caption_en": text([f"a photograph of place {n} in the light" for n in range(5000)]),
            "caption_zh": text([f"照片 {n}" for n in range(5000)]),
            "caption_status": "ok",
            "caption_model": "gemini-2.5-flash",
            "source": "url_list",
            "photographer": text([f"photographer {n}" for n in range(5000)]),
            "license": text(["CC0-1.0", "CC-BY-4.0"]),
            "duplicate_of": None,
            "kept": True,
        }
    )


def all_kept(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same rows with values that every rule passes and a caption of its own each."""
    rng = np.random.default_rng(seed)
    words = np.array(["lake", "quiet", "mountains", "warm", "morning", "light", "a", "of", "the"])
    rows = len(table)
    height = rng.integers(2160, 5000, rows)
    return table.assign(
        height=height,
        megapixels=table["width"] * height / 1e6,
        aspect_ratio=table["width"] / height,
        integrity="ok",
        flat_fraction=table["flat_fraction"] / 2,
        entropy_bits=rng.uniform(7.001, 8.0, rows),
        nsfw_score=0.01,
        quality_score=rng.uniform(4.001, 5.0, rows),
        caption_en=[" ".join(line) for line in words[rng.integers(0, len(words), (rows, 30))]],
        kept=True,
        reject_reason=None,
        reject_value=np.nan,
        reject_threshold=np.nan,
    )


def paper_settings() -> Settings:
    """The paper's recipe, whatever params.yaml is composed of."""
    import yaml

    return parse_settings(yaml.safe_load((ROOT / "conf" / "base.yaml").read_text(encoding="utf-8")))


def _select(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.selection.rules import select

    return lambda: select(table, settings.select, 1)


def _select_quotas(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.selection.rules import select

    wide = AspectQuotaSettings(
        name="wide", min_ratio=1.8, max_ratio=99.0, min_share=0.0, max_share=0.3
    )
    changes = {
        "aspect_quotas": (wide,),
        "character_quota": ShareSettings(min_share=0.25, max_share=1.0),
        "target_images": max(10, len(table) // 20),
    }
    return lambda: select(table, settings.select.model_copy(update=changes), 1)


def _what_if(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.selection.what_if import changed_settings, what_if

    changed = changed_settings(settings.select, ["entropy_bits=6.8"])
    return lambda: what_if(table, settings.select, changed, 1)


def _validate(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    import great_expectations.expectations
    import great_expectations.validator.validator  # noqa: F401

    from flows.validation import load_contract, validate, write_report

    named = settings.validation
    contracts = [load_contract(ROOT / n) for n in (named.raw, named.scored, named.released)]

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            report = validate(table, contracts, settings)
            write_report(report, Path(folder))
        failed = [o.column for o in report.outcomes if o.status == "failed"]
        return f"{len(report.outcomes)} expectations, failed {failed}"

    return run


def _slices(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.selection.slices import slices, split

    return lambda: slices(table.assign(split=split(table, settings.slices, 1)), settings.slices, 1)


def _datasheet(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.pages.datasheet import datasheet_page
    from components.corpus.selection.slices import slices, split

    table = table.assign(split=split(table, settings.slices, 1))
    tables = slices(table, settings.slices, 1)
    return lambda: datasheet_page(table, tables)


def _diff(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.pages.corpus_diff import diff
    from components.corpus.selection.rules import as_candidates, select
    from components.corpus.selection.what_if import changed_settings

    changed = changed_settings(settings.select, ["entropy_bits=6.8"])
    other = select(as_candidates(table), changed, 1)
    return lambda: diff(table, other)


def _drift(table: pd.DataFrame, settings: Settings) -> Callable[[], object]:
    from components.corpus.pages.drift import measure_drift

    return lambda: measure_drift(table, table)


def peak_gib() -> float:
    """Largest resident size of this process so far (Linux).

    getrusage would start from the size of the process that made the tables.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def measure(step: str, path: Path) -> None:
    """Run one step on the table at `path` and print its line."""
    settings = paper_settings()
    table = read_table(path)
    run = {
        "select": _select,
        "select_quotas": _select_quotas,
        "what_if": _what_if,
        "validate": _validate,
        "validate_kept": _validate,
        "slices": _slices,
        "datasheet": _datasheet,
        "diff": _diff,
        "drift": _drift,
    }[step](table, settings)
    before = peak_gib()
    started, cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_gib()
    note = result if step.startswith("validate") else ""
    print(f"{step:<14}{seconds:>8.2f}{cpu:>8.2f}{before:>12.2f}{peak:>10.2f}  {note}", flush=True)


def main() -> None:
    """Make the manifest, then measure every step in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.step:
        measure(options.step, options.table)
        return
    from components.corpus.selection.rules import select

    settings = paper_settings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        table = synthetic_manifest(options.rows, 0)
        table = assign_buckets(table, buckets(settings.buckets))
        table = select(table, settings.select, 1)
        write_table(table, path)
        print(f"{options.rows} rows, {int(table['kept'].sum())} kept", flush=True)
        # The released contract looks at kept rows, so its full cost shows only when all are.
        everything = Path(folder) / "all_kept.parquet"
        write_table(all_kept(table, 1), everything)
        del table
        print(
            f"{'step':<14}{'wall s':>8}{'cpu s':>8}{'GiB before':>12}{'GiB peak':>10}", flush=True
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GX_ANALYTICS_ENABLED": "false"}
        for step in STEPS:
            used = everything if step == "validate_kept" else path
            command = [sys.executable, __file__, "--step", step, "--table", str(used)]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
