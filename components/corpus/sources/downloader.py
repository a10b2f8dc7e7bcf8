"""Fetching original bytes from the open web: polite, bounded, resumable, and never trusting.

Redirects are followed by hand, every connection ends at a checked address, the kind of file is read
from its bytes, and the size in pixels from its first 64 KiB before the rest is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from yarl import URL

from components.corpus.sources.answer_headers import (
    BodyDecoder,
    Trail,
    cookie_header,
    forbidden_by_robots,
    leading_range,
    retry_after_s,
)
from components.corpus.sources.download_journal import (
    DownloadJournal,
    FetchFailed,
    Loss,
    Outcome,
    Stored,
)
from components.corpus.sources.host_limits import HostQueue, TokenBuckets
from components.corpus.sources.image_probe import (
    OWN_SIZES,
    PROBE_BYTES,
    image_extension,
    image_size,
)
from components.corpus.sources.originals import OriginalWriter, keep_originals
from components.corpus.sources.public_addresses import (
    CheckedConnector,
    CheckedResolver,
    RefusedAddress,
    Resolver,
    UnknownHost,
    failed_exchange,
    resolve,
)
from components.corpus.sources.url_identity import host_of
from components.images.decoding import ImageUndecodable, read_header
from components.settings.corpus import DownloadSettings

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REFUSING = frozenset({401, 402, 403, 407, 451})
_GONE = frozenset({404, 410})
# How servers refuse a request for a range: what the whole gets is seen when it is asked for.
_RANGE_REFUSING = frozenset({400, 403, 405, 406, 412, 416, 501})
_MIB = 2**20
# Outcomes that wait for the disk: what a kill costs at most is twice as many.
_WAITING = 256


@dataclass(frozen=True)
class _Landed:
    """An outcome that is not in the journal yet."""

    url: str
    outcome: Outcome
    original: OriginalWriter | None
    """Sealed bytes on their way into the store."""


@dataclass(frozen=True)
class DownloadProgress:
    """Where a download stands."""

    done: int
    total: int
    kept: int
    received_bytes: int
    elapsed_s: float

    @property
    def images_per_s(self) -> float:
        """Finished addresses per second, losses included."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def mb_per_s(self) -> float:
        """Received megabytes (10^6 bytes) per second, discarded ones included."""
        return self.received_bytes / 1e6 / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Downloader:
    """Fetches images into a store of originals.

    Args:
        settings: limits.
        folder: the store (see `originals`).
        resolver: addresses of a name; of these only public ones are connected to, except for
            `settings.private_hosts`.
    """

    def __init__(
        self, settings: DownloadSettings, folder: Path, resolver: Resolver = resolve
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._resolver = CheckedResolver(
            settings.private_hosts, resolver, settings.connect_timeout_s
        )
        # One set for all workers and for redirects: the limit is the host's, not the connection's.
        self._buckets = TokenBuckets(settings.requests_per_second)
        self._max_bytes = int(settings.max_mb * _MIB)
        self.received_bytes = 0

    def run(
        self,
        urls: Sequence[str],
        journal: DownloadJournal,
        report: Callable[[DownloadProgress], None] | None = None,
    ) -> None:
        """Give every URL an outcome in the journal.

        Args:
            urls: normalised, distinct, without an outcome so far.
            journal: receives each outcome as soon as it is known.
            report: called after every outcome.

        Raises:
            OSError: the store cannot be written; what has an outcome keeps it.
        """
        try:
            asyncio.run(self._run(urls, journal, report))
        except BaseExceptionGroup as group:
            # One worker's failure ends the others; that one is what the caller needs to see.
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    async def _run(
        self,
        urls: Sequence[str],
        journal: DownloadJournal,
        report: Callable[[DownloadProgress], None] | None,
    ) -> None:
        queue = HostQueue(
            ((host_of(url), (url, 1)) for url in urls),
            # The queue decides whom to ask, `_answer` takes the token: a redirect leads to hosts
            # that the queue has never heard of, and they are not to be flooded either.
            self._settings.host_connections,
            self._buckets,
        )
        landed: asyncio.Queue[_Landed | None] = asyncio.Queue(_WAITING)

        async def work(client: aiohttp.ClientSession) -> None:
            while (taken := await queue.take()) is not None:
                host, (url, attempt) = taken
                result: Stored | Loss
                original = None
                try:
                    result, original = await self._fetch(client, url)
                except FetchFailed as failure:
                    if failure.retry and attempt <= self._settings.retries:
                        # Back into the queue, so that no worker sleeps on one host's trouble.
                        queue.postpone(host, (url, attempt + 1), self._wait(failure, attempt))
                        continue
                    result = failure.loss
                except (OSError, MemoryError):
                    # The machine's trouble (a full disk), not this address's.
                    raise
                except Exception as problem:
                    # Untrusted input found a hole in a library: it costs this address alone.
                    result = Loss("unexpected", f"{type(problem).__name__}: {problem}")
                await landed.put(_Landed(url, Outcome(attempt, result), original))
                queue.done(host)

        # Names are looked up in threads; the few of the default would be asked one after another.
        executor = ThreadPoolExecutor(self._settings.concurrency)
        asyncio.get_running_loop().set_default_executor(executor)
        async with self._client() as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._bring_in(landed, len(urls), journal, report))
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self._settings.concurrency, max(len(urls), 1))):
                    workers.create_task(work(client))
            await landed.put(None)

    async def _bring_in(
        self,
        landed: asyncio.Queue[_Landed | None],
        total: int,
        journal: DownloadJournal,
        report: Callable[[DownloadProgress], None] | None,
    ) -> None:
        """Bring what has landed into store and journal, as much at once as came meanwhile.

        A flush of the disk takes as long for a hundred files as for one, so no download waits for
        one of its own, and a slow disk makes larger batches instead of slower ones.
        """
        started = time.monotonic()
        done = kept = 0
        is_over = False
        while not is_over:
            taken = [await landed.get()]
            while not landed.empty():
                taken.append(landed.get_nowait())
            is_over = taken[-1] is None
            batch = [one for one in taken if one is not None]
            originals = [one.original for one in batch if one.original is not None]
            if originals:
                await asyncio.to_thread(keep_originals, originals)
            journal.put(*((one.url, one.outcome) for one in batch))
            # In the journal before it is counted: what the progress has shown survives a kill.
            for one in batch:
                done += 1
                kept += one.original is not None
                if report is not None:
                    elapsed = time.monotonic() - started
                    report(DownloadProgress(done, total, kept, self.received_bytes, elapsed))

    def _client(self) -> aiohttp.ClientSession:
        settings = self._settings
        return aiohttp.ClientSession(
            connector=CheckedConnector(settings.concurrency, self._resolver),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=settings.connect_timeout_s,
                sock_read=settings.read_timeout_s,
            ),
            # No compression: what arrives are the original bytes; `BodyDecoder` undoes it where
            # servers compress all the same.
            auto_decompress=False,
            headers={
                "User-Agent": settings.user_agent,
                "Accept": "*/*",
                "Accept-Encoding": "identity",
            },
            # Cookies live as long as one address is being fetched (`_answer`).
            cookie_jar=aiohttp.DummyCookieJar(),
            # Some sites write more than aiohttp's 8 KB into one header.
            max_line_size=PROBE_BYTES,
            max_field_size=PROBE_BYTES,
            # A proxy of the environment would connect in our place, to addresses that nobody has
            # checked.
            trust_env=False,
        )

    def _wait(self, failure: FetchFailed, attempt: int) -> float:
        """Seconds before the next attempt: what the host asks for, else doubling."""
        backoff = self._settings.backoff_s * 2 ** (attempt - 1)
        wait = backoff if failure.wait_s is None else failure.wait_s
        return min(wait, self._settings.max_wait_s)

    @contextlib.asynccontextmanager
    async def _answer(
        self,
        client: aiohttp.ClientSession,
        url: str,
        headers: dict[str, str],
        cookies: aiohttp.CookieJar,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer at the end of the redirects, its body not yet read.

        Args:
            client: see `_client`.
            url: where to begin.
            headers: of every request.
            cookies: what the hosts on the way have set; grows.

        Raises:
            FetchFailed: no usable answer.
        """
        trail = Trail(url)
        while True:
            # Every hop pays its own host, the first one as well as the last.
            wait = self._buckets.reserve(host_of(url), time.monotonic())
            if wait > 0:
                await asyncio.sleep(wait)
            cookie = cookie_header(cookies, url)
            try:
                # Each read has its limit, and a host that sends a byte a minute keeps every such
                # limit.
                async with asyncio.timeout(self._settings.total_timeout_s):
                    response = await client.get(
                        URL(url, encoded=True),
                        headers=headers if cookie is None else headers | {"Cookie": cookie},
                        allow_redirects=False,
                    )
            except (aiohttp.ClientError, RefusedAddress, UnknownHost, TimeoutError) as problem:
                raise failed_exchange(problem) from None
            # Leaving it closes the connection of a body that has not been read to its end.
            async with response:
                if response.status not in _REDIRECTS:
                    self._check_status(response, url, is_ranged="Range" in headers)
                    yield response
                    return
                trail.sent(url, cookie)
                cookies.update_cookies_from_headers(
                    response.headers.getall("Set-Cookie", ()), URL(url, encoded=True)
                )
                url = trail.next_hop(response.headers.get("Location", ""), url, cookies)

    def _check_status(self, response: aiohttp.ClientResponse, url: str, *, is_ranged: bool) -> None:
        """Raise for anything but a body; a host that asks for a pause gets it."""
        status = response.status
        if status in (200, 206):
            if self._settings.respect_robots_tag:
                directive = forbidden_by_robots(
                    response.headers.getall("X-Robots-Tag", ()), self._settings.user_agent
                )
                if directive is not None:
                    raise FetchFailed("robots", f"X-Robots-Tag: {directive}")
            return
        # The caller asks again for the whole; only that answer says anything about the image.
        if is_ranged and status in _RANGE_REFUSING:
            return
        wait = retry_after_s(response.headers.get("Retry-After"), datetime.now(UTC))
        if wait is not None and status in (429, 503):
            pause = min(wait, self._settings.max_wait_s)
            # The pause is for the host, not for this address: the other workers would ask it at
            # once.
            self._buckets.pause(host_of(url), time.monotonic() + pause)
        if status == 429:
            raise FetchFailed("rate_limited", "HTTP 429", retry=True, wait_s=wait)
        if status >= 500:
            raise FetchFailed("server_error", f"HTTP {status}", retry=True, wait_s=wait)
        if status == 408:
            raise FetchFailed("timeout", "HTTP 408", retry=True)
        if status == 425:
            raise FetchFailed("http_error", "HTTP 425", retry=True)
        cause = "not_found" if status in _GONE else "http_error"
        raise FetchFailed("forbidden" if status in _REFUSING else cause, f"HTTP {status}")

    async def _fetch(
        self, client: aiohttp.ClientSession, url: str
    ) -> tuple[Stored, OriginalWriter]:
        """Probe, then fetch.

        Returns:
            the image, and its sealed bytes.

        Raises:
            FetchFailed: this attempt gave no image.
        """
        # Hosts may be addresses (`private_hosts`), which send cookies, too.
        cookies = aiohttp.CookieJar(unsafe=True)
        # Without a bound on pixels a probe would only be a second request: kind and bytes are
        # judged while the whole arrives.
        if self._settings.min_pixels > 1:
            ranged = {"Range": f"bytes=0-{PROBE_BYTES - 1}"}
            async with self._answer(client, url, ranged, cookies) as response:
                if response.status == 200:
                    # The server ignores ranges: this is the whole body already.
                    return await self._receive(response)
                if response.status == 206:
                    whole = await self._judge_start(response)
                    if whole is not None:
                        return whole
        async with self._answer(client, url, {}, cookies) as response:
            if response.status == 206:
                # Some servers answer 206 to a request without a range. It is the whole if it says
                # so, or says nothing; anything else would be kept as a cut file with a good hash.
                span = response.headers.get("Content-Range")
                held = leading_range(response.headers)
                if span is not None and (held is None or held[0] != held[1]):
                    raise FetchFailed("http_error", "HTTP 206 with a part of what was asked for")
            return await self._receive(response)

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body within time and uncompressed, transport problems as `FetchFailed`."""
        decoder = BodyDecoder(response.headers.get("Content-Encoding", ""))
        # A deadline for the body as a whole: slow drops would pass any limit per chunk.
        deadline = time.monotonic() + self._settings.total_timeout_s
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    chunk = await response.content.read(PROBE_BYTES)
            except (aiohttp.ClientError, TimeoutError) as problem:
                raise failed_exchange(problem) from None
            if not chunk:
                if not decoder.is_whole:
                    raise FetchFailed("truncated", "compressed body ends early", retry=True)
                return
            self.received_bytes += len(chunk)
            for piece in decoder.pieces(chunk):
                yield piece

    async def _judge_start(
        self, response: aiohttp.ClientResponse
    ) -> tuple[Stored, OriginalWriter] | None:
        """Refuse an image by its first bytes, or keep it if they are all it has.

        Of a partial answer whose bytes are not those that it says, nothing is concluded: None.
        """
        said = leading_range(response.headers)
        # The range of a compressed body counts other bytes than those of the file.
        if said is None or BodyDecoder(response.headers.get("Content-Encoding", "")).is_compressed:
            return None
        length, total = said
        if total is not None:
            self._check_size(total)
        start = b""
        async for chunk in self._chunks(response):
            start += chunk
            # A server that ignores the range sends on: the rest is never read.
            if len(start) >= PROBE_BYTES:
                start = start[:PROBE_BYTES]
                break
        # Fewer or more bytes than promised: it may be the middle of the file, so only the whole can
        # tell.
        if len(start) != min(length, PROBE_BYTES):
            return None
        extension = self._inspect(start, is_whole=total == len(start))
        # More is to come, or the size is unknown: the second request fetches it.
        return self._settle_bytes(start, extension) if total == len(start) else None

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise FetchFailed("too_large", f"more than {self._settings.max_mb:g} MiB")

    def _inspect(self, prefix: bytes, *, is_whole: bool) -> str:
        """File ending of the image that starts like this; refuses others and small ones."""
        extension = image_extension(prefix)
        if extension is None:
            raise FetchFailed("wrong_content", _described(prefix))
        # Of a whole file `settle` reads the same header; of these formats it may read less.
        if is_whole and extension not in OWN_SIZES:
            return extension
        size = image_size(prefix)
        if size is not None and size[0] * size[1] < self._settings.min_pixels:
            raise FetchFailed("too_small", f"{size[0]}x{size[1]}")
        return extension

    async def _receive(self, response: aiohttp.ClientResponse) -> tuple[Stored, OriginalWriter]:
        """Write the body to the store; judged after 64 KiB, measured while it arrives."""
        length = response.headers.get("Content-Length", "")
        # Refused before a byte of it is paid for, where the server says how long it is; the count
        # while it arrives is what holds against those that lie.
        if length.isascii() and length.isdigit():
            # Cut, because Python refuses to read thousands of digits.
            self._check_size(int(length[:18]))
        start = b""
        chunks = self._chunks(response)
        # Judged while it arrives: a page of HTML or a small picture ends the transfer after 64 KiB.
        async for chunk in chunks:
            start += chunk
            if len(start) >= PROBE_BYTES:
                break
        self._check_size(len(start))
        extension = self._inspect(start[:PROBE_BYTES], is_whole=len(start) < PROBE_BYTES)
        if len(start) < PROBE_BYTES:
            return self._settle_bytes(start, extension)
        with OriginalWriter(self._folder) as writer:
            writer.write(start)
            async for chunk in chunks:
                self._check_size(writer.size_bytes + len(chunk))
                writer.write(chunk)
            least = self._settings.min_pixels
            return await asyncio.to_thread(settle, writer, extension, least), writer

    def _settle_bytes(self, data: bytes, extension: str) -> tuple[Stored, OriginalWriter]:
        with OriginalWriter(self._folder) as writer:
            writer.write(data)
            return settle(writer, extension, self._settings.min_pixels), writer


def settle(writer: OriginalWriter, extension: str, min_pixels: int) -> Stored:
    """Read the header of a complete file and seal it.

    Raises:
        FetchFailed: fewer than `min_pixels`.
    """
    size_bytes = writer.size_bytes
    try:
        # No bound here: the bound on megapixels belongs to settings that may change, and the
        # journal keeps facts about the bytes. The tables apply today's bounds.
        header = read_header(writer.read(), max_megapixels=float("inf"))
    except ImageUndecodable as problem:
        kept = writer.seal(extension)
        return Stored(kept, extension, size_bytes, None, None, None, str(problem))
    height, width = header.height, header.width
    if height * width < min_pixels:
        raise FetchFailed("too_small", f"{height}x{width}")
    kept = writer.seal(extension)
    return Stored(kept, extension, size_bytes, width, height, header.format, "ok", header)


def _described(prefix: bytes) -> str:
    """What a body is that is no image of a known format."""
    if not prefix:
        return "empty body"
    start = prefix.lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return f"starts with {prefix[:8].hex()}"
