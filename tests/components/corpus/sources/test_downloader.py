"""The downloader against a real server on 127.0.0.1 that misbehaves in every way it knows."""

from __future__ import annotations

import asyncio
import hashlib
import io
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image
from raw_server import Handler, Request, Server

from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.corpus.sources.downloader import Downloader
from components.corpus.sources.originals import original_path
from components.corpus.sources.public_addresses import (
    CheckedConnector,
    CheckedResolver,
    resolve,
)
from components.images.decoding import read_header
from components.settings.corpus import DownloadSettings

AGENT = "ultraflux-corpus/0.1"
# Above the probe, so that a refused body is visibly not sent.
BODY_BYTES = 300_000


def photograph(kind: str = "JPEG", size: tuple[int, int] = (400, 600), seed: int = 0) -> bytes:
    """Noise (height, width): hardly compressible, so bodies are large."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95)
    return file.getvalue()


PHOTO = photograph()
SMALL = photograph(size=(199, 200)) + bytes(BODY_BYTES)


def serves(data: bytes, **headers: object) -> Handler:
    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        await server.body(writer, request, data, **headers)

    return handle


def answers(status: str, times: int = 10**9, **headers: object) -> Handler:
    """`status` for the first requests, then the photograph."""

    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        if request.number <= times:
            server.head(writer, status, Content_Length=0, **headers)
        else:
            await server.body(writer, request, PHOTO)

    return handle


async def _ignores_ranges(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    request.headers.pop("range", None)
    await server.body(writer, request, PHOTO)


async def _truncated(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    if request.range_end is not None:
        return await server.body(writer, request, PHOTO)
    server.head(writer, "200 OK", Content_Length=len(PHOTO))
    writer.write(PHOTO[:100_000])
    return None


async def _once_truncated(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    first = request.range_end is None and server.full_requests[request.path] == 1
    await (_truncated if first else serves(PHOTO))(server, writer, request)


async def _slow(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    """Never silent for long, never done: only a limit on the whole body ends it."""
    server.head(writer, "200 OK", Content_Length=len(PHOTO))
    for byte in PHOTO:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def _silent(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    await asyncio.sleep(5)


async def _endless(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
    """No length given, more than the cap sent."""
    server.head(writer, "200 OK")
    writer.write(PHOTO)
    while True:
        writer.write(bytes(65536))
        await writer.drain()
        server.sent[request.path] += 65536


async def _loop_with_new_names(
    server: Server, writer: asyncio.StreamWriter, request: Request
) -> None:
    number = int(request.path.partition("?")[2] or 0)
    server.head(writer, "302 Found", Location=f"/endless-hops?{number + 1}", Content_Length=0)


ROUTES: dict[str, Handler] = {
    "/ok.jpg": serves(PHOTO),
    "/no-ranges.jpg": _ignores_ranges,
    "/tiny.jpg": serves(photograph(size=(200, 201))),
    "/page-says-html.jpg": serves(PHOTO, Content_Type="text/html"),
    "/html-says-jpeg.jpg": serves(b"<!DOCTYPE html><p>gone" + bytes(9000)),
    "/gif.jpg": serves(photograph("GIF")),
    "/empty.jpg": serves(b""),
    "/small.jpg": serves(SMALL),
    "/over.jpg": serves(PHOTO + bytes(2 * 2**20)),
    "/endless.jpg": _endless,
    "/truncated.jpg": _truncated,
    "/once-truncated.jpg": _once_truncated,
    "/slow.jpg": _slow,
    "/silent.jpg": _silent,
    "/busy.jpg": answers("429 Too Many Requests", 1, Retry_After="1"),
    "/always-busy.jpg": answers("429 Too Many Requests", Retry_After="0"),
    "/broken-twice.jpg": answers("503 Service Unavailable", 2),
    "/broken.jpg": answers("500 Internal Server Error"),
    "/gone.jpg": answers("404 Not Found"),
    "/secret.jpg": answers("403 Forbidden"),
    "/teapot.jpg": answers("418 I'm a teapot"),
    "/moved.jpg": answers("301 Moved", Location="/ok.jpg"),
    "/nowhere.jpg": answers("302 Found"),
    "/nowhere-said.jpg": answers("302 Found", Location=""),
    "/to-ftp.jpg": answers("302 Found", Location="ftp://127.0.0.1/x"),
    "/to-file.jpg": answers("302 Found", Location="file:///etc/passwd"),
    "/to-metadata.jpg": answers("302 Found", Location="http://169.254.169.254/latest/"),
    "/to-intranet.jpg": answers("302 Found", Location="http://10.0.0.1/x.jpg"),
    "/to-mapped.jpg": answers("302 Found", Location="http://[::ffff:10.0.0.1]/x.jpg"),
    "/loop-a.jpg": answers("302 Found", Location="/loop-b.jpg"),
    "/loop-b.jpg": answers("302 Found", Location="/loop-a.jpg"),
    "/endless-hops": _loop_with_new_names,
    "/noai.jpg": serves(PHOTO, X_Robots_Tag="noarchive, noai"),
    "/noai-for-others.jpg": serves(PHOTO, X_Robots_Tag="otherbot: noindex"),
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ROUTES)
    yield server
    server.close()


def limits(**changes: object) -> DownloadSettings:
    values = {
        "concurrency": 8,
        "host_connections": 8,
        "requests_per_second": 1000.0,
        "connect_timeout_s": 2.0,
        "read_timeout_s": 0.5,
        "total_timeout_s": 1.0,
        "max_mb": 1.0,
        "min_pixels": 200 * 200,
        "retries": 2,
        "backoff_s": 0.01,
        "max_wait_s": 3.0,
        "user_agent": AGENT,
        "respect_robots_tag": True,
        "private_hosts": ("127.0.0.1",),
    }
    return DownloadSettings.model_validate(values | changes)


def fetch(
    server: Server, tmp_path: Path, *paths: str, settings: DownloadSettings | None = None
) -> dict[str, Outcome]:
    """Outcome by path."""
    with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
        urls = [server.url(path) for path in paths]
        Downloader(settings or limits(), tmp_path / "originals").run(urls, journal)
        found = {path: journal.get(url) for path, url in zip(paths, urls, strict=True)}
    assert all(found.values())
    return {path: outcome for path, outcome in found.items() if outcome is not None}


def stored(tmp_path: Path, outcome: Outcome) -> bytes:
    result = outcome.result
    assert isinstance(result, Stored), result
    return original_path(tmp_path / "originals", result.sha256, result.extension).read_bytes()


def loss(outcome: Outcome) -> Loss:
    assert isinstance(outcome.result, Loss)
    return outcome.result


def no_partial_files(tmp_path: Path) -> bool:
    return not list((tmp_path / "originals").glob(".partial/*"))


def test_original_bytes_are_kept_under_their_hash_with_header_and_size(
    server: Server, tmp_path: Path
) -> None:
    paths = ("/ok.jpg", "/no-ranges.jpg", "/page-says-html.jpg", "/moved.jpg")
    outcomes = fetch(server, tmp_path, *paths)
    for outcome in outcomes.values():
        assert stored(tmp_path, outcome) == PHOTO
        digest = hashlib.sha256(PHOTO).hexdigest()
        header = read_header(PHOTO)
        assert outcome.result == Stored(digest, ".jpg", len(PHOTO), 600, 400, "JPEG", "ok", header)
        assert outcome.attempts == 1
    # A server without ranges is asked once: its answer to the probe is the body.
    assert server.requests["/no-ranges.jpg"] == 1
    assert no_partial_files(tmp_path)


def test_a_small_picture_is_refused_by_its_header_and_the_body_is_never_sent(
    server: Server, tmp_path: Path
) -> None:
    outcomes = fetch(server, tmp_path, "/small.jpg", "/tiny.jpg")
    assert outcomes["/small.jpg"].result == Loss("too_small", "199x200")
    assert server.requests["/small.jpg"] == 1
    assert server.sent["/small.jpg"] == 65536
    # One pixel row more, and a file shorter than the probe.
    assert isinstance(outcomes["/tiny.jpg"].result, Stored)


def test_what_is_no_image_is_refused_whatever_its_header_says(
    server: Server, tmp_path: Path
) -> None:
    outcomes = fetch(server, tmp_path, "/html-says-jpeg.jpg", "/gif.jpg", "/empty.jpg")
    assert outcomes["/html-says-jpeg.jpg"].result == Loss("wrong_content", "an HTML page")
    assert loss(outcomes["/gif.jpg"]) == Loss("wrong_content", f"starts with {b'GIF87a'.hex()}5802")
    assert outcomes["/empty.jpg"].result == Loss("wrong_content", "empty body")
    assert {outcome.attempts for outcome in outcomes.values()} == {1}


def test_bodies_over_the_cap_end_early_with_and_without_a_declared_length(
    server: Server, tmp_path: Path
) -> None:
    outcomes = fetch(server, tmp_path, "/over.jpg", "/endless.jpg")
    for outcome in outcomes.values():
        assert outcome.result == Loss("too_large", "more than 1 MiB")
    assert server.sent["/over.jpg"] <= 65536
    assert no_partial_files(tmp_path)


def test_a_host_that_asks_for_a_pause_gets_it(server: Server, tmp_path: Path) -> None:
    outcome = fetch(server, tmp_path, "/busy.jpg")["/busy.jpg"]
    assert stored(tmp_path, outcome) == PHOTO
    assert outcome.attempts == 2
    first, second = server.times["/busy.jpg"][:2]
    assert second - first >= 0.99


def test_transient_failures_are_retried_and_lasting_ones_are_not(
    server: Server, tmp_path: Path
) -> None:
    final = {
        "/gone.jpg": Loss("not_found", "HTTP 404"),
        "/secret.jpg": Loss("forbidden", "HTTP 403"),
        "/teapot.jpg": Loss("http_error", "HTTP 418"),
        "/nowhere.jpg": Loss("bad_redirect", "no Location"),
        "/nowhere-said.jpg": Loss("bad_redirect", "no Location"),
        "/to-ftp.jpg": Loss("bad_redirect", "scheme is not http or https"),
        "/to-file.jpg": Loss("bad_redirect", "scheme is not http or https"),
    }
    transient = {
        "/always-busy.jpg": Loss("rate_limited", "HTTP 429"),
        "/broken.jpg": Loss("server_error", "HTTP 500"),
        "/truncated.jpg": Loss("truncated", "connection ended before the answer did"),
    }
    recovering = ("/broken-twice.jpg", "/once-truncated.jpg")
    outcomes = fetch(server, tmp_path, *final, *transient, *recovering)
    for path, expected in final.items():
        assert outcomes[path].attempts == 1, path
        assert outcomes[path].result == expected, path
    for path, expected in transient.items():
        assert (outcomes[path].attempts, outcomes[path].result) == (3, expected), path
    for path in recovering:
        assert stored(tmp_path, outcomes[path]) == PHOTO
    assert outcomes["/broken-twice.jpg"].attempts == 3
    assert outcomes["/once-truncated.jpg"].attempts == 2
    assert no_partial_files(tmp_path)


def test_slow_and_silent_servers_cost_the_time_cap_and_no_more(
    server: Server, tmp_path: Path
) -> None:
    started = time.monotonic()
    outcomes = fetch(
        server, tmp_path, "/slow.jpg", "/silent.jpg", "/ok.jpg", settings=limits(retries=0)
    )
    assert time.monotonic() - started < 4
    assert loss(outcomes["/slow.jpg"]).cause == "timeout"
    assert loss(outcomes["/silent.jpg"]).cause == "timeout"
    assert stored(tmp_path, outcomes["/ok.jpg"]) == PHOTO


def test_every_hop_of_a_redirect_must_end_at_a_public_address(
    server: Server, tmp_path: Path
) -> None:
    paths = ("/to-metadata.jpg", "/to-intranet.jpg", "/to-mapped.jpg")
    outcomes = fetch(server, tmp_path, *paths)
    for path, address in zip(
        paths, ("169.254.169.254", "10.0.0.1", "::ffff:10.0.0.1"), strict=True
    ):
        assert loss(outcomes[path]).cause == "refused_address"
        assert address in loss(outcomes[path]).detail
        assert outcomes[path].attempts == 1


def test_without_permission_the_local_server_itself_is_refused(
    server: Server, tmp_path: Path
) -> None:
    outcome = fetch(server, tmp_path, "/ok.jpg", settings=limits(private_hosts=()))["/ok.jpg"]
    assert loss(outcome).cause == "refused_address"
    assert not server.requests


def test_redirects_that_never_end_are_cut(server: Server, tmp_path: Path) -> None:
    outcomes = fetch(server, tmp_path, "/loop-a.jpg", "/endless-hops")
    assert {loss(outcome).cause for outcome in outcomes.values()} == {"redirect_loop"}
    assert sum(server.requests.values()) <= 2 + 9


def test_robots_headers_are_respected_unless_switched_off(server: Server, tmp_path: Path) -> None:
    outcomes = fetch(server, tmp_path, "/noai.jpg", "/noai-for-others.jpg")
    assert outcomes["/noai.jpg"].result == Loss("robots", "X-Robots-Tag: noai")
    assert server.sent["/noai.jpg"] <= 65536
    assert stored(tmp_path, outcomes["/noai-for-others.jpg"]) == PHOTO
    careless = limits(respect_robots_tag=False)
    outcome = fetch(server, tmp_path / "b", "/noai.jpg", settings=careless)["/noai.jpg"]
    assert isinstance(outcome.result, Stored)


def test_an_address_as_a_number_is_refused(server: Server, tmp_path: Path) -> None:
    with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
        urls = [f"http://{host}:{server.port}/ok.jpg" for host in ("2130706433", "127.1", "[::1]")]
        Downloader(limits(), tmp_path / "originals").run(urls, journal)
        found = [journal.get(url) for url in urls]
    assert [loss(o).cause for o in found if o] == ["refused_address"] * 3
    assert not server.requests


def test_connections_that_rest_are_bounded_and_the_oldest_goes() -> None:
    async def resting() -> list[bool]:
        resolver = CheckedResolver(["127.0.0.1"], resolve, 1.0)
        # One in use at a time, so one may rest.
        connector = CheckedConnector(1, resolver)
        protocols = []
        async with aiohttp.ClientSession(connector=connector) as client:
            for number in (0, 1, 2):
                async with client.get(f"http://127.0.0.1:{ports[number]}/") as answer:
                    assert answer.connection is not None
                    protocols.append(answer.connection.protocol)
                    await answer.read()
            return [one is not None and one.is_connected() for one in protocols]

    async def polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keeps its connection open."""
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(bytes(2000))
        await reader.read()
        writer.close()

    async def scenario() -> list[bool]:
        hosts = [await asyncio.start_server(polite, "127.0.0.1", 0) for _ in range(3)]
        ports.extend(host.sockets[0].getsockname()[1] for host in hosts)
        found = await resting()
        for host in hosts:
            host.close()
        return found

    ports: list[int] = []
    assert asyncio.run(scenario()) == [False, False, True]


def test_nobody_listening_and_unknown_names_are_losses(server: Server, tmp_path: Path) -> None:
    with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
        urls = ["http://127.0.0.1:1/a.jpg", "http://nothing.invalid/a.jpg"]

        async def unknown(host: str, port: int) -> list[str]:
            return ["127.0.0.1"] if host == "127.0.0.1" else []

        Downloader(limits(), tmp_path / "originals", unknown).run(urls, journal)
        found = [journal.get(url) for url in urls]
    assert [loss(o).cause for o in found if o] == ["refused_connection", "unknown_host"]


def test_a_name_server_that_changes_its_answer_cannot_lead_inside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["10.1.2.3", "93.184.216.34"], ["192.168.0.7"]]
    connected = []
    connect = socket.socket.connect

    def to_this_machine(self: socket.socket, address: tuple[str, int]) -> None:
        """A network in which every address is here; remembers what was asked for."""
        connected.append(address[0])
        connect(self, ("127.0.0.1", address[1]))

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    monkeypatch.setattr(socket.socket, "connect", to_this_machine)
    url = f"http://photos.example:{server.port}/ok.jpg"
    with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
        Downloader(limits(private_hosts=()), tmp_path / "originals", rebinding).run([url], journal)
        outcome = journal.get(url)
    # The probe went to the checked public address; the second connection was refused.
    assert outcome is not None
    assert loss(outcome).detail == "photos.example is 192.168.0.7, not a public address"
    assert connected == ["93.184.216.34"]
    assert server.full_requests["/ok.jpg"] == 0


def test_the_rate_limit_holds_per_host(server: Server, tmp_path: Path) -> None:
    settings = limits(requests_per_second=20.0, min_pixels=1)
    started = time.monotonic()
    paths = [f"/gone.jpg?{number}" for number in range(30)]
    fetch(server, tmp_path, *paths, settings=settings)
    # 20 at once, the other ten at 20 per second.
    assert 0.4 < time.monotonic() - started < 3


def test_a_surprise_costs_one_address_and_a_full_disk_ends_the_run(
    server: Server, tmp_path: Path
) -> None:
    async def odd(host: str, port: int) -> list[str]:
        raise LookupError("codec")

    urls = ["http://odd.example/ok.jpg", server.url("/ok.jpg"), server.url("/moved.jpg")]
    with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
        downloader = Downloader(limits(), tmp_path / "o", odd)
        downloader.run(urls[:2], journal)
        first, second = journal.get(urls[0]), journal.get(urls[1])
        assert first is not None
        assert second is not None
        assert loss(first) == Loss("unexpected", "LookupError: codec")
        assert isinstance(second.result, Stored)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        # What a full disk does to a write, for this process alone.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(PHOTO) // 2, most[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                downloader.run(urls[2:], journal)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        assert journal.get(urls[2]) is None
