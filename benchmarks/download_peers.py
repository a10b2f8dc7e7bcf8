"""Ingest of a list of addresses beside img2dataset, from one server on this machine, in turn.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset
    python benchmarks/download_peers.py /tmp/peer/bin/img2dataset [--images 2000] [--rounds 3]

A process on 127.0.0.1 serves small copies of the bundled photographs, no two of them the same
bytes. Both programs read one CSV, keep original bytes with their sha256, and write tables beside
them; 32 requests at a time; nothing is re-encoded. Each is a process of its own. Seconds are wall
and CPU time of a run less those of a run over one address, so that imports do not count; memory is
the peak, sampled every 20 ms, of what its processes hold to themselves and share in parts (PSS).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from corpus_download import bodies, serve

ROOT = Path(__file__).resolve().parents[1]
CONNECTIONS = 32
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


def ours(table: Path, folder: Path) -> list[str]:
    """The command of `ingest` without its stage."""
    params = ROOT / "params.yaml"
    return [sys.executable, "-c", INGEST, *map(str, (params, table, folder, CONNECTIONS))]


def theirs(program: str, table: Path, folder: Path) -> list[str]:
    """The command of img2dataset that does the same work."""
    return [
        *(program, f"--url_list={table}", "--input_format=csv", "--url_col=url"),
        *(f"--output_folder={folder / 'images'}", "--output_format=files"),
        *("--disable_all_reencoding=True", "--compute_hash=sha256", "--enable_wandb=False"),
        *("--processes_count=1", f"--thread_count={CONNECTIONS}"),
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


def measured(command: list[str], images: int, folder: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds, and peak MiB, of a command that leaves `images` JPEG files."""
    before = os.times()
    started = time.perf_counter()
    peak = 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _held_bytes(process))
            time.sleep(0.02)
    wall = time.perf_counter() - started
    after = os.times()
    assert child.returncode == 0, command
    assert sum(1 for _ in folder.rglob("*.jpg")) == images, command
    cpu = after.children_user - before.children_user
    return wall, cpu + after.children_system - before.children_system, peak / 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="img2dataset")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--edge", type=int, default=256, help="long edge of what is served")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = bodies(options.images, options.edge)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(files, there), daemon=True)
    server.start()
    figures: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    try:
        port = here.recv()
        for _ in range(options.rounds):
            for images in (1, options.images):
                for name in ("ours", "img2dataset"):
                    with tempfile.TemporaryDirectory() as place:
                        folder = Path(place)
                        table = folder / "list.csv"
                        lines = (f"http://127.0.0.1:{port}/{n}.jpg" for n in range(images))
                        table.write_text("\n".join(["url", *lines, ""]))
                        command = (
                            ours(table, folder)
                            if name == "ours"
                            else theirs(options.program, table, folder)
                        )
                        found = measured(command, images, folder)
                        figures.setdefault((name, images), []).append(found)
    finally:
        server.terminate()
        server.join()
    print(
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}; {options.images} JPEGs, "
        f"{sum(map(len, files)) / 1e6:.1f} MB; median of {options.rounds}"
    )
    print(f"{'':12} {'images/s':>9} {'CPU ms':>7} {'peak MiB':>9}")
    for name in ("ours", "img2dataset"):
        one, all_of_them = (
            [statistics.median(column) for column in zip(*figures[name, images], strict=True)]
            for images in (1, options.images)
        )
        wall, cpu = (all_of_them[at] - one[at] for at in (0, 1))
        print(
            f"{name:12} {options.images / wall:9.0f} {1e3 * cpu / options.images:7.2f} "
            f"{all_of_them[2]:9.0f}"
        )


if __name__ == "__main__":
    main()
