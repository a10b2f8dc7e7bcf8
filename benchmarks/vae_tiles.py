"""Tiles of many photographs at a low limit of open files: time, disk, memory, descriptors.

    python benchmarks/vae_tiles.py [FOLDER] [--photographs 5000] [--open-files 256] [--workers 2]
        [--tile-px 1024] [--tiles 2] [--crop-px 512] [--out FOLDER]

The photographs of FOLDER (default: data/sample) stand in for as many as are wanted, each under ids
of its own; each is read, hashed, decoded and cut anew, as the stage `vae` does it, with the limit
of open files set for this process and its workers. Then batches of 64 crops are read from all
tiles. CPU seconds are of this process and its workers, peaks the largest resident set of each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from components.engine.ordered_pool import EngineLimits
from components.training.vae.crops import Photograph, WorkingCopies

ROOT = Path(__file__).resolve().parents[1]
_ENDINGS = {".jpg", ".jpeg", ".png"}
_BATCH, _BATCHES = 64, 20


@dataclass(frozen=True)
class Copy:
    """A file that is hashed whenever it is read, as an original of a manifest is."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    def read_bytes(self) -> bytes:
        """All of them."""
        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise OSError(0, "other bytes than before")
        return data


class Descriptors:
    """The most descriptors that this process has had open, looked at every 50 ms."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, len(os.listdir("/proc/self/fd")))

    def end(self) -> int:
        """Stop looking."""
        self._over.set()
        self._thread.join()
        return self.most


def cpu_s() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def photographs_of(folder: Path, count: int) -> list[Photograph]:
    """As many as wanted, from the files of a folder in turn."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not files:
        raise SystemExit(f"{folder}: no photographs")
    copies = [Copy(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return [
        Photograph(f"{copies[n % len(copies)].sha256}-{n:06d}", copies[n % len(copies)])
        for n in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "data" / "sample")
    parser.add_argument("--photographs", type=int, default=5000)
    parser.add_argument("--open-files", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tile-px", type=int, default=1024)
    parser.add_argument("--tiles", type=int, default=2)
    parser.add_argument("--crop-px", type=int, default=512)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (options.open_files, options.open_files))
    photographs = photographs_of(options.folder, options.photographs)
    limits = EngineLimits(workers=options.workers, timeout_s=300.0, memory_mb=4096, retries=1)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        descriptors = Descriptors()
        began, used = time.perf_counter(), cpu_s()
        copies = WorkingCopies(
            photographs,
            options.crop_px,
            Path(folder),
            tile_px=options.tile_px,
            tiles_per_photograph=options.tiles,
            limits=limits,
        )
        wall, used = time.perf_counter() - began, cpu_s() - used
        shards = sorted(copies.store.glob("*.bin"))
        size = sum(path.stat().st_size for path in shards)
        print(f"photographs {len(copies)} cut, {len(copies.left_out)} left out")
        print(f"cutting     {wall:.0f} s wall, {used / len(photographs):.3f} CPU s a photograph")
        print(f"disk        {size / 1e9:.1f} GB in {len(shards)} shards")
        began = time.perf_counter()
        for step in range(_BATCHES):
            copies.batch(0, step, range(_BATCH))
        each = (time.perf_counter() - began) / _BATCHES / _BATCH
        print(f"crops       {1000 * each:.1f} ms each in batches of {_BATCH}")
        mapped = Path("/proc/self/maps").read_text().count(str(copies.store))
        print(f"open        at most {descriptors.end()} descriptors, {mapped} mappings of tiles")
        peaks = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        here, there = (one.ru_maxrss / 2**20 for one in peaks)
        print(f"memory      {here:.2f} GiB in this process, {there:.2f} GiB in a worker")


if __name__ == "__main__":
    main()
