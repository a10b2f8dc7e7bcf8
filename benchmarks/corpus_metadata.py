"""Reading released metadata: records per second and peak memory of ingest without downloads.

Synthetic shards in the form of MultiAspect-4K-1M (1,008 JSON shards, 1,007,230 records; here a
fiftieth by default): long captions, attribution on 98%, unknown keys, 0.5% duplicate addresses,
0.5% records that cannot be used. Every address gets a planted outcome (3% dead links), so the
tables that ingest writes are known in advance. Peaks are the growth over a start with everything
imported. Run `python benchmarks/corpus_metadata.py [--fraction 0.02]`; one JSON line comes out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.corpus.sources.ingest_tables import (
    pending_keys,
    write_candidates,
    write_ingest_tables,
)
from components.corpus.sources.multiaspect import read_metadata_shards
from components.settings.schema import load_settings

ROOT = Path(__file__).resolve().parents[1]
SHARDS, RECORDS = 1008, 1_007_230
DEAD, DUPLICATE, UNUSABLE, ATTRIBUTED = 0.03, 0.005, 0.005, 0.98


def make_shards(folder: Path, fraction: float, seed: int = 0) -> tuple[int, int]:
    """Write shards; returns (records, of these with a new usable address)."""
    rng = np.random.default_rng(seed)
    words = [f"{['lake', 'hill', 'boat', 'light', 'sky'][n % 5]}{n}" for n in range(500)]
    shards, records = max(1, round(SHARDS * fraction)), round(RECORDS * fraction)
    folder.mkdir(parents=True)
    number = distinct = 0
    for shard, size in enumerate(np.diff(np.linspace(0, records, shards + 1).astype(int))):
        rows: list[Any] = []
        for draw in rng.random((size, 4)):
            address = number
            if draw[0] < DUPLICATE and number:
                address = 0
            if draw[0] > 1 - UNUSABLE:
                rows.append({"en_caption": "no address"} if draw[1] < 0.5 else "text")
                continue
            distinct += address == number
            caption = " ".join(words[i] for i in rng.integers(0, len(words), 110))
            row = {
                "image_url": f"https://photos.example/{address // 1000}/{address}.jpg",
                "en_caption": caption,
                "id": number,
                "aspect": "16:9",
                "exif": {"iso": 100, "lens": None},
            }
            if draw[2] < ATTRIBUTED:
                row |= {"photographer": f"Author {number % 5000}", "license": "CC0"}
            rows.append(row)
            number += 1
        (folder / f"{shard:04}.json").write_text(json.dumps(rows), encoding="utf-8")
    return records, distinct


def plant_outcomes(candidates: Path, folder: Path) -> int:
    """An outcome for every address, as if all had been fetched; returns the dead links."""
    dead = 0
    with DownloadJournal(folder / "journal.sqlite", "benchmark") as journal:
        journal._database.execute("begin")
        for key in pending_keys(candidates, journal, folder / "originals"):
            digest = hashlib.sha256(key.encode()).hexdigest()
            result: Stored | Loss
            if int(digest[:6], 16) < DEAD * 2**24:
                result = Loss("not_found", "HTTP 404")
                dead += 1
            else:
                result = Stored(digest, ".jpg", 9_000_000, 5760, 3840, "JPEG", "ok")
            journal.put(key, Outcome(1, result))
        journal._database.execute("commit")
    return dead


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Run in a fresh process of one core; seconds of CPU and growth of the peak in MiB."""

    def child(pipe: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu = time.process_time()
        value = work()
        cpu = time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send({"cpu_s": cpu, "peak_mib": (peak - before) / 1024, "value": value})

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fraction", type=float, default=0.02)
    fraction = parser.parse_args().fraction
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = load_settings(ROOT / "params.yaml").ingest.model_copy(
        update={"kind": "multiaspect", "source": "shards"}
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        records, distinct = make_shards(folder / "shards", fraction)
        shard_mb = sum(path.stat().st_size for path in (folder / "shards").iterdir()) / 1e6
        candidates = folder / "candidates.parquet"

        def read() -> int:
            return sum(1 for _ in read_metadata_shards(folder / "shards", "shards"))

        def collect() -> dict[str, Any]:
            return write_candidates(
                read_metadata_shards(folder / "shards", "shards"), candidates
            ).report()

        def tables() -> tuple[int, int, int]:
            with DownloadJournal(folder / "journal.sqlite", "benchmark") as journal:
                counts = write_ingest_tables(candidates, journal, folder, "originals", settings)
            return counts.candidates, counts.kept, sum(counts.losses.values())

        parse, candidate = measured(read), measured(collect)
        dead = plant_outcomes(candidates, folder)
        written = measured(tables)
    result = {
        "records": records,
        "shard_mb": round(shard_mb, 1),
        **{
            f"{name}_{key}": value
            for name, part in (("parse", parse), ("candidates", candidate), ("tables", written))
            for key, value in (
                ("records_per_s", round(records / part["cpu_s"])),
                ("peak_mib", round(part["peak_mib"])),
            )
        },
        "exact": written["value"] == (records, distinct - dead, records - distinct + dead),
        "field_share": candidate["value"]["field_share"]["photographer"],
        "processor": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
