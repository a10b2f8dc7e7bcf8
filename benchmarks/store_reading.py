"""Random batches from the latent store against raw preadv of the same extents, in alternation.

    python benchmarks/store_reading.py [--gib 2] [--batch 8] [--batches 40] [--rounds 7]

A store of random bfloat16 latents of 4096 x 4096 photographs (16 x 256 x 256: 2 MiB a record) is
written to a temporary folder. Every round reads the same random batches by each way, the order of
the ways turning from round to round: `preadv` in this process, one call per record, into a buffer
that is used again; the store into such a buffer, verified as `runtime.verify_reads` is by default
(`first`), on every read (`always`) and `never`; and as training reads, a new tensor per batch. The
round before those that count reads every batch once, so warm reads under `first` are of records
that this process has verified. `cold` drops the shards from the page cache before each
(posix_fadvise DONTNEED; whatever the disk or a hypervisor keeps stays). A ratio is of two readings
of one round; its median over the rounds is the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from verdicts import Verdict, conclude

from components.training.stores.latent_store import LatentStore, LatentStoreWriter
from components.training.stores.record_reader import Verify

SHAPE = (16, 256, 256)
RECORD_BYTES = 2 * 16 * 256 * 256
BASELINE = "preadv"
VERIFY: tuple[Verify, ...] = ("first", "always", "never")


def write_store(folder: Path, records: int) -> Path:
    """A store of `records` random latents in two buckets."""
    writer = LatentStoreWriter(
        folder / "work", dtype="bfloat16", shard_mb=512, encoder_digest="random"
    )
    generator = torch.Generator().manual_seed(0)
    for start in range(0, records, 16):
        latents = torch.randn(16, *SHAPE, generator=generator).bfloat16()
        images = [(f"{number:064x}", "train") for number in range(start, start + 16)]
        writer.append((4096, 4096), images, latents)
    writer.publish(folder / "store")
    return folder / "store"


def drop_from_cache(folder: Path) -> None:
    """Clean pages of the shards leave the page cache."""
    for shard in folder.glob("*.bin"):
        descriptor = os.open(shard, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def raw_reading(store: LatentStore, batches: Sequence[Sequence[str]]) -> Callable[[], None]:
    """One preadv per record, in the order of the batches, into one buffer."""
    where = store.index.set_index("image_id")[["shard", "offset"]]
    descriptors = {
        name: os.open(store.folder / name, os.O_RDONLY) for name in where["shard"].unique()
    }
    extents = [
        [(descriptors[where.at[i, "shard"]], int(where.at[i, "offset"])) for i in batch]
        for batch in batches
    ]
    buffer = np.empty((len(batches[0]), RECORD_BYTES), dtype=np.uint8)
    buffer[:] = 0

    def read() -> None:
        for batch in extents:
            for place, (descriptor, offset) in enumerate(batch):
                assert os.preadv(descriptor, [buffer[place]], offset) == RECORD_BYTES

    return read


def store_reading(
    folder: Path, batches: Sequence[Sequence[str]], verify: Verify
) -> Callable[[], None]:
    """The store into a buffer that is used again."""
    store = LatentStore(folder, verify=verify)
    buffer = torch.zeros((len(batches[0]), *SHAPE), dtype=torch.bfloat16)

    def read() -> None:
        for batch in batches:
            store.read_stored(batch, out=buffer)

    return read


def training_reading(folder: Path, batches: Sequence[Sequence[str]]) -> Callable[[], None]:
    """A new tensor in the stored precision per batch, verified: what the trainer asks for."""
    store = LatentStore(folder, verify="first")

    def read() -> None:
        for batch in batches:
            store.read_stored(batch)

    return read


def main() -> int:
    """Measure and print; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the store")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the store is written for the while")
    options = parser.parse_args()
    records = int(options.gib * 2**30 / RECORD_BYTES) // 16 * 16
    rng = np.random.default_rng(0)
    batches = [
        [f"{number:064x}" for number in rng.choice(records, options.batch, replace=False)]
        for _ in range(options.batches)
    ]
    gigabytes = options.batches * options.batch * RECORD_BYTES / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = write_store(Path(temporary), records)
        ways = {
            BASELINE: raw_reading(LatentStore(folder), batches),
            **{f"store, {verify}": store_reading(folder, batches, verify) for verify in VERIFY},
            "training": training_reading(folder, batches),
        }
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; store "
            f"of {records} records of {RECORD_BYTES / 2**20:.0f} MiB, {options.batches} batches of "
            f"{options.batch}, n = {options.rounds} rounds"
        )
        verdicts = []
        for state in ("warm", "cold"):
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(options.rounds + 1):
                names = list(ways)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    if state == "cold":
                        drop_from_cache(folder)
                    begin = time.perf_counter()
                    ways[name]()
                    seconds[name].append(time.perf_counter() - begin)
            for name, times in seconds.items():
                # The first round fills caches and pages of buffers.
                ratios = [b / t for b, t in zip(seconds[BASELINE][1:], times[1:], strict=True)]
                print(
                    f"{state} {name:20} {gigabytes / statistics.median(times[1:]):6.2f} GB/s, "
                    f"of preadv {statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f})"
                )
                if name == "store, first":
                    title = f"latent store, {state}: rate / preadv"
                    verdicts.append(Verdict(title, tuple(ratios), 0.9, at_most=False))
    return conclude(verdicts)


if __name__ == "__main__":
    sys.exit(main())
