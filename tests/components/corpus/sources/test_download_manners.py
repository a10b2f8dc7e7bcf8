"""Ranges that are refused or lied about, cookies on the way, and waits that are kept once."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image
from raw_server import Handler, Request, Server

from components.corpus.sources.answer_headers import leading_range
from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.corpus.sources.downloader import Downloader
from components.settings.corpus import DownloadSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]


def photograph(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


PHOTO = photograph(300, 400)
TINY = photograph(60, 70)
assert len(PHOTO) > 65536 > len(TINY)
WHOLE = f"bytes 0-{len(PHOTO) - 1}/{len(PHOTO)}"


def whole(status: str, part: bytes, **headers: object) -> Handler:
    """One answer to every request."""

    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        server.head(writer, status, Content_Length=len(part), **headers)
        writer.write(part)

    return handle


def ranged(status: str, part: bytes, **headers: object) -> Handler:
    """This to a request with a range, the photograph to one without."""

    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        if request.range_end is None:
            await server.body(writer, request, PHOTO)
        else:
            await whole(status, part, **headers)(server, writer, request)

    return handle


def at_first(times: int, status: str, **headers: object) -> Handler:
    """`status` to the first requests, then the photograph."""

    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        if request.number > times:
            await server.body(writer, request, PHOTO)
        else:
            server.head(writer, status, Content_Length=0, **headers)

    return handle


def limits(**changes: object) -> DownloadSettings:
    values = load_settings(ROOT / "params.yaml").ingest.download.model_dump()
    quick = {"requests_per_second": 1000.0, "backoff_s": 0.01, "min_pixels": 2000, "retries": 2}
    return DownloadSettings.model_validate(
        values | quick | {"private_hosts": ("127.0.0.1",)} | changes
    )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server({})
    yield server
    server.close()


def fetch_all(
    server: Server, folder: Path, handlers: dict[str, Handler], **changes: object
) -> dict[str, Outcome]:
    """What becomes of addresses by path, each answered by a handler."""
    server.routes |= handlers
    with DownloadJournal(folder / "journal.sqlite", "s") as journal:
        urls = [server.url(path) for path in handlers]
        Downloader(limits(**changes), folder / "originals").run(urls, journal)
        found = {path: journal.get(url) for path, url in zip(handlers, urls, strict=True)}
    return {path: outcome for path, outcome in found.items() if outcome is not None}


def fetch(server: Server, folder: Path, handler: Handler, **changes: object) -> Outcome:
    """What becomes of one address that `handler` answers."""
    return fetch_all(server, folder, {"/a.jpg": handler}, **changes)["/a.jpg"]


def is_photo(outcome: Outcome, data: bytes = PHOTO) -> bool:
    result = outcome.result
    return isinstance(result, Stored) and result.sha256 == hashlib.sha256(data).hexdigest()


def test_where_a_range_is_refused_the_whole_is_asked_for_once(
    server: Server, tmp_path: Path
) -> None:
    statuses = (400, 403, 405, 406, 412, 416, 501)
    handlers = {f"/{status}.jpg": ranged(f"{status} No", b"") for status in statuses}
    for path, outcome in fetch_all(server, tmp_path, handlers).items():
        assert outcome.attempts == 1
        assert is_photo(outcome), path
        assert server.requests[path] == 2


def raw(answer: bytes) -> Handler:
    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        writer.write(answer)

    return handle


def test_an_answer_that_is_no_http_is_a_cause_of_its_own_and_asked_for_once(
    server: Server, tmp_path: Path
) -> None:
    ok = b"HTTP/1.1 200 OK\r\n"
    said = {
        "/status": (b"HTTP/1.1 abc\r\n\r\n", "no HTTP: Bad status line"),
        "/bytes": (b"\x00\xff" * 100, "no HTTP: Bad status line"),
        "/head": (ok + b"X: " + b"a" * 70_000 + b"\r\n\r\n", "no HTTP: Got more than 65536 "),
        "/twice": (
            ok + b"Content-Length: 9\r\nContent-Length: 5\r\n\r\n",
            "no HTTP: Duplicate Content-Length",
        ),
        "/minus": (ok + b"Content-Length: -5\r\n\r\n", "no HTTP: Invalid character in Content-L"),
    }
    found = fetch_all(server, tmp_path, {path: raw(answer) for path, (answer, _) in said.items()})
    for path, (_, detail) in said.items():
        result = found[path].result
        assert isinstance(result, Loss)
        assert (found[path].attempts, result.cause) == (1, "bad_answer"), path
        assert result.detail.startswith(detail)


def test_a_strange_pause_and_a_request_that_came_too_early_are_asked_again(
    server: Server, tmp_path: Path
) -> None:
    handlers = {
        "/early": at_first(1, "425 Too Early"),
        "/pause": at_first(1, "503 Busy", Retry_After=f"Wed, 21 Oct 2026 07:28:00 +{9**20}"),
    }
    for path, outcome in fetch_all(server, tmp_path, handlers).items():
        assert is_photo(outcome), path
        assert outcome.attempts == 2


def test_what_refuses_the_whole_as_well_is_lost_for_that_reason(
    server: Server, tmp_path: Path
) -> None:
    outcome = fetch(server, tmp_path, at_first(9, "403 Forbidden"))
    assert outcome == Outcome(1, Loss("forbidden", "HTTP 403"))
    assert server.requests["/a.jpg"] == 2
    outcome = fetch(server, tmp_path / "b", at_first(99, "501 Not Implemented"), retries=0)
    assert outcome == Outcome(1, Loss("server_error", "HTTP 501"))
    # A missing file is asked for once.
    server.requests.clear()
    fetch(server, tmp_path / "c", at_first(9, "404 Not Found"))
    assert server.requests["/a.jpg"] == 1


PARTS: list[tuple[bytes, dict[str, object]]] = [
    (PHOTO, {}),
    (PHOTO[:65536], {}),
    (PHOTO[:65536], {"Content_Range": "bytes 0-65535/1"}),
    (PHOTO[:65536], {"Content_Range": "bytes 0-99/100"}),
    (PHOTO[:100], {"Content_Range": "bytes 0-65535/300000"}),
    (PHOTO[:100], {"Content_Range": "bytes 0-9/100"}),
    (b"<html>", {"Content_Range": "bytes 0-65535/300000"}),
    (PHOTO[1000:66536], {"Content_Range": f"bytes 1000-66535/{len(PHOTO)}"}),
    (PHOTO[:65536], {"Content_Range": "kilobytes"}),
    (b"--x\r\n\r\n", {"Content_Type": "multipart/byteranges; boundary=x"}),
    (b"<html>", {}),
]


def test_nothing_is_concluded_from_a_part_that_does_not_say_what_it_is(
    server: Server, tmp_path: Path
) -> None:
    handlers = {
        f"/{number}.jpg": ranged("206 Partial Content", part, **headers)
        for number, (part, headers) in enumerate(PARTS)
    }
    for path, outcome in fetch_all(server, tmp_path, handlers).items():
        assert is_photo(outcome), path
        assert (outcome.attempts, server.requests[path]) == (1, 2)


def test_a_part_that_is_all_is_kept_without_asking_again(server: Server, tmp_path: Path) -> None:
    span = f"bytes 0-{len(TINY) - 1}/{len(TINY)}"
    outcome = fetch(server, tmp_path, whole("206 Partial", TINY, Content_Range=span))
    assert is_photo(outcome, TINY)
    assert server.requests["/a.jpg"] == 1
    # With the size left open, the rest is asked for.
    open_ended = f"bytes 0-{len(TINY) - 1}/*"
    fetch(server, tmp_path / "b", whole("206 Partial", TINY, Content_Range=open_ended))
    assert server.requests["/a.jpg"] == 3


def test_a_server_that_calls_everything_a_part(server: Server, tmp_path: Path) -> None:
    assert is_photo(fetch(server, tmp_path, whole("206 Partial", PHOTO)))
    assert is_photo(fetch(server, tmp_path / "b", whole("206 Partial", PHOTO, Content_Range=WHOLE)))
    start = whole("206 Partial", PHOTO[:70000], Content_Range=f"bytes 0-69999/{len(PHOTO)}")
    outcome = fetch(server, tmp_path / "c", start)
    assert outcome.result == Loss("http_error", "HTTP 206 with a part of what was asked for")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes 0-9/10", (10, 10)),
        ("Bytes 0-9/*", (10, None)),
        ("bytes 0-9/9", None),
        ("bytes 1-9/10", None),
        ("bytes */10", None),
        ("", None),
    ],
)
def test_only_a_range_from_the_first_byte_on_says_anything(
    value: str, expected: tuple[int, int | None] | None
) -> None:
    assert leading_range(httpx.Headers({"Content-Range": value})) == expected
    multipart = {"Content-Range": value, "Content-Type": "Multipart/byteranges; boundary=x"}
    assert leading_range(httpx.Headers(multipart)) is None


def asks_for_cookie(location: str = "/a.jpg", **cookie: object) -> Handler:
    """A redirect that sets a cookie; the photograph where the cookie comes back."""

    async def handle(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        if "seen=1" in request.headers.get("cookie", ""):
            await server.body(writer, request, PHOTO)
        else:
            fields = {"Set_Cookie": "seen=1; Path=/", "Location": location} | cookie
            server.head(writer, "302 Found", Content_Length=0, **fields)

    return handle


def test_a_redirect_to_itself_is_followed_with_the_cookie_that_it_sets(
    server: Server, tmp_path: Path
) -> None:
    outcome = fetch(server, tmp_path, asks_for_cookie())
    assert is_photo(outcome)
    # Twice for the probe; the whole is asked for with the cookie at once.
    assert (outcome.attempts, server.requests["/a.jpg"]) == (1, 3)
    # The next address begins without cookies.
    both = {"/a.jpg": asks_for_cookie(), "/b.jpg": asks_for_cookie("/b.jpg")}
    fetch_all(server, tmp_path / "b", both, concurrency=1)
    assert server.requests["/b.jpg"] == 3


def test_a_detour_that_sets_the_cookie_leads_back(server: Server, tmp_path: Path) -> None:
    server.routes["/consent"] = asks_for_cookie("/a.jpg")
    outcome = fetch(server, tmp_path, asks_for_cookie("/consent", Set_Cookie="other=1"))
    assert is_photo(outcome)
    assert server.requests["/consent"] == 1


async def _new_cookie_each_time(
    server: Server, writer: asyncio.StreamWriter, request: Request
) -> None:
    cookie = f"n={request.number}"
    server.head(writer, "302 Found", Content_Length=0, Set_Cookie=cookie, Location="/a.jpg")


def test_redirects_to_itself_without_a_new_cookie_or_without_end_are_a_loop(
    server: Server, tmp_path: Path
) -> None:
    for number, handler in enumerate(
        [
            at_first(99, "302 Found", Location="/a.jpg"),
            asks_for_cookie(Set_Cookie="seen=0"),
            asks_for_cookie(Set_Cookie="seen=1; Domain=example.com"),
            _new_cookie_each_time,
        ]
    ):
        server.requests.clear()
        outcome = fetch(server, tmp_path / str(number), handler)
        assert isinstance(outcome.result, Loss)
        assert outcome.result.cause == "redirect_loop"
        assert server.requests["/a.jpg"] <= 2


def test_a_cookie_opens_no_private_address(server: Server, tmp_path: Path) -> None:
    outcome = fetch(server, tmp_path, asks_for_cookie("http://10.0.0.1/a.jpg"))
    assert isinstance(outcome.result, Loss)
    assert outcome.result.cause == "refused_address"


def test_between_two_attempts_one_back_off_is_kept(server: Server, tmp_path: Path) -> None:
    """0.2 s, then 0.4 s; and what the host asks for in place of these, not on top.

    A busy machine only adds: of some attempts at measuring one has to be nearly exact. A back-off
    that is kept twice is at the double in every one.
    """
    for number in range(5):
        folder = tmp_path / str(number)
        server.times.clear()
        server.requests.clear()
        outcome = fetch(
            server, folder, at_first(2, "503 Busy"), backoff_s=0.2, min_pixels=1, max_wait_s=9.0
        )
        assert outcome.attempts == 3
        first, second, third = server.times["/a.jpg"]
        assert second - first >= 0.2
        assert third - second >= 0.4
        backoff = (second - first) / 0.2, (third - second) / 0.4
        server.times.clear()
        server.requests.clear()
        asked = at_first(1, "429 Busy", Retry_After="1")
        fetch(server, folder / "b", asked, backoff_s=0.9, min_pixels=1, max_wait_s=9.0)
        first, second = server.times["/a.jpg"]
        assert second - first >= 1
        if max(*backoff, second - first) < 1.5:
            return
    pytest.fail(f"waits of {backoff} back-offs, {second - first:.2f} s where 1 s was asked for")


def test_no_wait_is_longer_than_the_longest(server: Server, tmp_path: Path) -> None:
    patient = at_first(1, "429 Busy", Retry_After="3600")
    assert is_photo(fetch(server, tmp_path, patient, max_wait_s=0.1, min_pixels=1))
    first, second = server.times["/a.jpg"]
    assert 0.1 <= second - first < 5


def test_a_body_is_what_it_is_compressed_from_or_says_that_it_is_not(
    server: Server, tmp_path: Path
) -> None:
    """Servers compress although `Accept-Encoding: identity` asks for the bytes as they are."""
    handlers = {
        "/packed.jpg": whole("200 OK", gzip.compress(PHOTO), Content_Encoding="gzip"),
        "/lies.jpg": whole("200 OK", PHOTO, Content_Encoding="gzip"),
    }
    found = fetch_all(server, tmp_path, handlers)
    assert is_photo(found["/packed.jpg"])
    lies = Outcome(1, Loss("wrong_content", "not compressed as its header says"))
    assert found["/lies.jpg"] == lies


@pytest.mark.parametrize("photo", [PHOTO, TINY])
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "raw deflate"])
def test_a_compressed_body_without_its_end_is_asked_for_again_and_truncated(
    server: Server, tmp_path: Path, photo: bytes, encoding: str
) -> None:
    """The length of such a body agrees with its header."""
    made = zlib.compressobj(wbits={"deflate": 15, "raw deflate": -15}.get(encoding, 31))
    packed = made.compress(photo) + made.flush()
    told = {"Content_Encoding": encoding.rpartition(" ")[2]}
    cut = whole("200 OK", packed[:-100], **told)

    async def mended(server: Server, writer: asyncio.StreamWriter, request: Request) -> None:
        answer = cut if request.number == 1 else whole("200 OK", packed, **told)
        await answer(server, writer, request)

    found = fetch_all(server, tmp_path, {"/cut.jpg": cut, "/mended.jpg": mended}, retries=1)
    assert found["/cut.jpg"] == Outcome(2, Loss("truncated", "compressed body ends early"))
    assert is_photo(found["/mended.jpg"], photo)
    assert found["/mended.jpg"].attempts == 2


def test_a_compressed_body_is_bounded_by_what_it_unfolds_to(server: Server, tmp_path: Path) -> None:
    bomb = gzip.compress(PHOTO + bytes(2**28))
    # gzip knows several streams one after the other.
    two = gzip.compress(PHOTO[:9000]) + gzip.compress(PHOTO[9000:])
    handlers = {
        "/bomb.jpg": whole("200 OK", bomb, Content_Encoding="gzip"),
        "/two.jpg": whole("200 OK", two, Content_Encoding="GZIP"),
        "/br.jpg": whole("200 OK", PHOTO, Content_Encoding="br"),
    }
    tracemalloc.start()
    found = fetch_all(server, tmp_path, handlers, max_mb=1.0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["/bomb.jpg"].result == Loss("too_large", "more than 1 MiB")
    assert most < 2**25
    assert is_photo(found["/two.jpg"])
    assert found["/br.jpg"].result == Loss("wrong_content", "compressed (br), unasked")


def test_a_certificate_that_nobody_vouches_for_is_one_lost_address(tmp_path: Path) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    private = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(private, None)
    )
    key.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    chain.write_bytes(certificate.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}/a.jpg"
        with DownloadJournal(tmp_path / "journal.sqlite", "s") as journal:
            Downloader(limits(), tmp_path / "originals").run([url], journal)
            outcome = journal.get(url)
        server.shutdown()
    assert outcome == Outcome(1, Loss("tls", "CERTIFICATE_VERIFY_FAILED"))
