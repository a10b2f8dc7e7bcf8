"""Throughput of the downloader against a bare httpx loop, from a server on this machine.

    python benchmarks/corpus_download.py [--images 300] [--edge 1024] [--rounds 2]

A process on 127.0.0.1 serves the bundled photographs at a small size, each with bytes of its own
at the end so that no two are the same file. Variants run in turn, the fastest round counts.
Images/s and MB/s are of wall time, with server and client on one machine; CPU is the client's
alone, and the ratio is of that, because other work on the machine disturbs it less.

- bare: httpx, as many tasks as connections; every body goes to a file, nothing is looked at.
- downloader: addresses checked, body sniffed while it arrives, hashed, its header read, stored by
  content and flushed to the disk, outcome journalled.
- with probe: the same after a ranged request for the header (`min_pixels`), two requests an image.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
from PIL import Image

from components.corpus.sources.download_journal import DownloadJournal, Stored
from components.corpus.sources.downloader import Downloader
from components.settings.corpus import DownloadSettings

ROOT = Path(__file__).resolve().parents[1]
CONNECTIONS = (1, 8, 32)


def bodies(images: int, edge_px: int) -> list[bytes]:
    """Different JPEG files, small copies of the sample in turn."""
    small = []
    for path in sorted((ROOT / "data" / "sample").glob("*.jpg")):
        with Image.open(path) as image:
            image.thumbnail((edge_px, edge_px))
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=90)
            small.append(file.getvalue())
    cycle = itertools.cycle(small)
    return [next(cycle) + number.to_bytes(4, "big") for number in range(images)]


def serve(files: list[bytes], pipe: Connection) -> None:
    """Serve `files` at /N.jpg, with ranges, until the process is ended.

    /span: seconds from the first request on to the last answer, as JSON; the next begins anew.
    """
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes; without this the second waits for an acknowledgement.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if self.path == "/span":
                span = json.dumps(max(times) - min(times)).encode()
                times.clear()
                self.send_response(200)
                self.send_header("Content-Length", str(len(span)))
                self.end_headers()
                self.wfile.write(span)
                return
            times.append(time.perf_counter())
            body = files[int(self.path.strip("/").removesuffix(".jpg"))]
            wanted = self.headers.get("Range")
            part = body
            if wanted is None:
                self.send_response(200)
            else:
                part = body[: int(wanted.rpartition("-")[2]) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes 0-{len(part) - 1}/{len(body)}")
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)
            times.append(time.perf_counter())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    # The default queue of five turns away who opens a connection for each of 32 requests at once.
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_port)
    server.serve_forever()


async def _bare(urls: list[str], connections: int, folder: Path) -> None:
    queue = iter(enumerate(urls))
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:

        async def work() -> None:
            for number, url in queue:
                answer = await client.get(url)
                answer.raise_for_status()
                (folder / f"{number}.jpg").write_bytes(answer.content)

        await asyncio.gather(*(work() for _ in range(connections)))


def bare(urls: list[str], connections: int, folder: Path) -> None:
    """Fetch everything into files, believing everything."""
    asyncio.run(_bare(urls, connections, folder))


def downloader(urls: list[str], connections: int, folder: Path, *, min_pixels: int = 1) -> None:
    """Fetch everything into a store of originals."""
    settings = DownloadSettings(
        concurrency=connections,
        host_connections=connections,
        requests_per_second=1e6,
        connect_timeout_s=10.0,
        read_timeout_s=30.0,
        total_timeout_s=60.0,
        max_mb=64.0,
        min_pixels=min_pixels,
        retries=0,
        backoff_s=0.0,
        max_wait_s=0.0,
        user_agent="ultraflux-benchmark/0.1",
        respect_robots_tag=True,
        private_hosts=("127.0.0.1",),
    )
    with DownloadJournal(folder / "journal.sqlite", "benchmark") as journal:
        Downloader(settings, folder / "originals").run(urls, journal)
        outcomes = [journal.get(url) for url in urls]
    assert all(outcome and isinstance(outcome.result, Stored) for outcome in outcomes)


def with_probe(urls: list[str], connections: int, folder: Path) -> None:
    """The same after a look at the header."""
    downloader(urls, connections, folder, min_pixels=2)


VARIANTS: dict[str, Callable[[list[str], int, Path], None]] = {
    "bare": bare,
    "downloader": downloader,
    "with probe": with_probe,
}


def seconds(
    variant: Callable[[list[str], int, Path], None], urls: list[str], count: int
) -> tuple[float, float]:
    """Wall and CPU time of one run into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started, cpu_started = time.perf_counter(), time.process_time()
        variant(urls, count, Path(folder))
        return time.perf_counter() - started, time.process_time() - cpu_started


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--edge", type=int, default=1024, help="long edge of what is served")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    files = bodies(options.images, options.edge)
    megabytes = sum(map(len, files)) / 1e6
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(files, theirs), daemon=True)
    server.start()
    try:
        port = ours.recv()
        urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(len(files))]
        print(
            f"{platform.machine()}; {len(files)} JPEGs, {megabytes:.1f} MB; "
            f"server and client on one machine"
        )
        print(
            f"{'connections':>11} {'variant':12} {'images/s':>9} {'MB/s':>7} "
            f"{'CPU ms':>7} {'x bare':>7}"
        )
        for count in CONNECTIONS:
            best = dict.fromkeys(VARIANTS, (float("inf"), float("inf")))
            for _ in range(options.rounds):
                for name, variant in VARIANTS.items():
                    wall, cpu = seconds(variant, urls, count)
                    best[name] = min(best[name][0], wall), min(best[name][1], cpu)
            for name, (wall, cpu) in best.items():
                print(
                    f"{count:11} {name:12} {len(files) / wall:9.0f} {megabytes / wall:7.1f} "
                    f"{cpu / len(files) * 1e3:7.2f} {cpu / best['bare'][1]:7.2f}"
                )
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
