"""Ingest of a list of addresses beside img2dataset, from one server on this machine, in turn.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset
    python benchmarks/download_peers.py /tmp/peer/bin/img2dataset [--images 2000] [--rounds 5]

A process on 127.0.0.1 serves small copies of the bundled photographs, no two of them the same
bytes. Both programs read one CSV, keep original bytes with their sha256, and write tables beside
them; nothing is re-encoded. Each is a process of its own; who comes first changes with the rounds.

Images/s are of the time from the first request to the last answer, as the server sees it: a start
of seconds, which a busy machine makes longer or shorter by seconds, is in neither. CPU is that of a
run less that of one over one address; memory the peak, sampled every 20 ms, of what its processes
hold to themselves and share in parts (PSS), imports included.

Exit code 1: ingest is slower in every round, or its median of peaks is above that of img2dataset.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
from corpus_download import bodies, serve

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ours", "img2dataset")
INGEST = """\
import sys
from pathlib import Path
from components.corpus.sources.collect import collect
from components.settings.corpus import DownloadSettings
from components.settings.schema import load_settings
settings = load_settings(Path(sys.argv[1])).ingest
download = settings.download.model_dump() | {
    "concurrency": int(sys.argv[4]), "host_connections": int(sys.argv[4]),
    "requests_per_second": 1e6, "min_pixels": 2, "private_hosts": ("127.0.0.1",),
}
settings = settings.model_copy(update={
    "kind": "urls", "source": sys.argv[2], "download": DownloadSettings.model_validate(download),
})
out = Path(sys.argv[3])
found = collect(settings, out / "ingest", root=out, state_dir=out / "state")
assert found.kept == found.candidates, found
"""


class Run(NamedTuple):
    """What one run of a program took."""

    images_per_s: float
    cpu_s: float
    peak_mib: float


def ours(table: Path, folder: Path, connections: int) -> list[str]:
    """The command of `ingest` without its stage."""
    params = ROOT / "params.yaml"
    return [sys.executable, "-c", INGEST, *map(str, (params, table, folder, connections))]


def theirs(program: str, table: Path, folder: Path, connections: int) -> list[str]:
    """The command of img2dataset that does the same work."""
    return [
        *(program, f"--url_list={table}", "--input_format=csv", "--url_col=url"),
        *(f"--output_folder={folder / 'images'}", "--output_format=files"),
        *("--disable_all_reencoding=True", "--compute_hash=sha256", "--enable_wandb=False"),
        *("--processes_count=1", f"--thread_count={connections}"),
        "--number_sample_per_shard=10000",
    ]


def _held_bytes(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measured(command: list[str], images: int, folder: Path) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command that leaves `images` JPEG files."""
    before = os.times()
    peak = 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _held_bytes(process))
            time.sleep(0.02)
    after = os.times()
    assert child.returncode == 0, command
    assert sum(1 for _ in folder.rglob("*.jpg")) == images, command
    cpu = after.children_user - before.children_user
    return cpu + after.children_system - before.children_system, peak / 2**20


def one_run(name: str, program: str, port: int, images: int, connections: int) -> Run:
    """One program over the first `images` addresses, into an empty folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        table = folder / "list.csv"
        lines = (f"http://127.0.0.1:{port}/{n}.jpg" for n in range(images))
        table.write_text("\n".join(["url", *lines, ""]))
        command = (
            ours(table, folder, connections)
            if name == "ours"
            else theirs(program, table, folder, connections)
        )
        cpu, peak = measured(command, images, folder)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/span") as answer:
        return Run(images / json.load(answer), cpu, peak)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="img2dataset")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--edge", type=int, default=256, help="long edge of what is served")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32, help="requests at a time")
    options = parser.parse_args()
    files = bodies(options.images, options.edge)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(files, there), daemon=True)
    server.start()
    runs: dict[tuple[str, int], list[Run]] = {}
    try:
        port = here.recv()
        for number in range(options.rounds):
            for images in (1, options.images):
                for name in NAMES if number % 2 else NAMES[::-1]:
                    run = one_run(name, options.program, port, images, options.connections)
                    runs.setdefault((name, images), []).append(run)
    finally:
        server.terminate()
        server.join()
    print(
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}; {options.images} JPEGs of "
        f"{sum(map(len, files)) / 1e3 / len(files):.1f} kB, {options.connections} connections; "
        f"median of {options.rounds}"
    )
    print(f"{'':12} {'images/s':>9} {'CPU ms':>7} {'peak MiB':>9}")
    peaks = {}
    cpu_ms = {}
    for name in NAMES:
        all_of_them = runs[name, options.images]
        start = statistics.median(run.cpu_s for run in runs[name, 1])
        cpu = statistics.median(run.cpu_s for run in all_of_them)
        peaks[name] = statistics.median(run.peak_mib for run in all_of_them)
        cpu_ms[name] = 1e3 * (cpu - start) / options.images
        rate = statistics.median(run.images_per_s for run in all_of_them)
        print(f"{name:12} {rate:9.0f} {cpu_ms[name]:7.2f} {peaks[name]:9.0f}")
    pairs = zip(*(runs[name, options.images] for name in NAMES), strict=True)
    ratios = sorted(mine.images_per_s / other.images_per_s for mine, other in pairs)
    print(
        f"ours over img2dataset: images/s {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), CPU {cpu_ms[NAMES[0]] / cpu_ms[NAMES[1]]:.2f}, "
        f"peak {peaks[NAMES[0]] / peaks[NAMES[1]]:.2f}"
    )
    if ratios[-1] < 1 or peaks[NAMES[0]] > peaks[NAMES[1]]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
