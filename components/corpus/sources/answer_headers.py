"""What the head of an answer says: robots, pauses, where to go, which bytes follow, how packed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from components.corpus.sources.download_journal import FetchFailed
from components.corpus.sources.url_identity import normalise_url

MAX_REDIRECTS = 8

# X-Robots-Tag directives that forbid what a training corpus does with an image.
_FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
# Directives that have a colon themselves; elsewhere a colon ends the name of a robot.
_WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\s*", re.IGNORECASE)
_GZIP = frozenset({"gzip", "x-gzip"})
_NOT_READ = frozenset({"br", "zstd"})
_PIECE_BYTES = 65536
"""A bomb is refused by its size while it unfolds, so little of it may unfold at once."""


def forbidden_by_robots(values: Sequence[str], user_agent: str) -> str | None:
    """The first X-Robots-Tag directive that keeps the image out of a corpus, or None.

    Args:
        values: one string per header line, "directive, ..." or "robot: directive, ...".
        user_agent: lines for other robots do not concern us.
    """
    # Lines are looked at one by one: joined with commas, as repeated headers may be, a robot's name
    # in the second line would look like a directive of the first.
    for value in values:
        name, colon, rest = value.lower().partition(":")
        directives = value.lower()
        # A comma before the first colon means that the line is a list whose colon belongs to a
        # directive further on.
        if colon and "," not in name and name.strip() not in _WITH_VALUE:
            if name.strip() not in ("*", user_agent.lower().partition("/")[0]):
                continue
            directives = rest
        for directive in directives.split(","):
            if directive.strip() in _FORBIDDING:
                return directive.strip()
    return None


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None: nothing, or nonsense."""
    if value is None:
        return None
    if re.fullmatch("[0-9]+", value.strip()):
        # Cut, because a host may send any number of digits; nine are 31 years, and the caller has a
        # limit.
        return float(value.strip()[:9])
    try:
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            # "-0000" and old date formats give a naive time; HTTP dates are in UTC, whatever they
            # say.
            when = when.replace(tzinfo=UTC)
        return max(0.0, (when - now).total_seconds())
    # Offsets of any size, and a year 9999 that an offset moves into the next.
    except (TypeError, ValueError, OverflowError):
        return None


def leading_range(headers: Mapping[str, str]) -> tuple[int, int | None] | None:
    """Which bytes a partial answer says it holds (RFC 9110, 14.4).

    Returns:
        (number of bytes, size of the file if it says), for bytes from the first on; None when it
        says nothing, contradicts itself, or holds other bytes or several ranges.
    """
    # The body of several ranges is a MIME message: its first bytes are a separator, not the file's.
    if headers.get("Content-Type", "").lower().startswith("multipart/"):
        return None
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    # Bytes from the middle would be judged as the head of a file.
    if first != 0 or (total is not None and total <= last):
        return None
    return last + 1, total


def cookie_header(cookies: aiohttp.CookieJar, url: str) -> str | None:
    """What a request for `url` has to say of them."""
    found = cookies.filter_cookies(URL(url, encoded=True)) if len(cookies) else {}
    return "; ".join(f"{name}={morsel.coded_value}" for name, morsel in found.items()) or None


class Trail:
    """The addresses that redirects have led through.

    Args:
        url: where it begins.
    """

    def __init__(self, url: str) -> None:
        self._cookie: dict[str, str | None] = {url: None}
        self._again: set[str] = set()
        self._hops = 0

    def sent(self, url: str, cookie: str | None) -> None:
        """Note what a request for `url` said."""
        self._cookie[url] = cookie

    def next_hop(self, location: str, url: str, cookies: aiohttp.CookieJar) -> str:
        """Where a redirect leads; back to a place only once, with a cookie that was not sent there.

        Raises:
            FetchFailed: nowhere, in a circle, or on and on.
        """
        if not location.strip():
            # As a relative address it would be the same place again.
            raise FetchFailed("bad_redirect", "no Location")
        try:
            following = normalise_url(urljoin(url, location))
        except ValueError as problem:
            raise FetchFailed("bad_redirect", str(problem)) from None
        # A site may set a cookie and send the visitor back to the same address; with the cookie the
        # second answer differs. Without a new cookie it can only be a circle.
        if following in self._cookie:
            cookie = cookie_header(cookies, following)
            if following in self._again or cookie == self._cookie[following]:
                raise FetchFailed("redirect_loop", f"back to {following}")
            self._again.add(following)
        self._hops += 1
        if self._hops > MAX_REDIRECTS:
            raise FetchFailed("redirect_loop", f"more than {MAX_REDIRECTS} redirects")
        self._cookie.setdefault(following, None)
        return following


class BodyDecoder:
    """Undoes a Content-Encoding while the body arrives, and knows whether the stream has ended.

    aiohttp takes a gzip stream that lacks its end for a whole one.

    Args:
        encoding: value of the header; one that is not known leaves the bytes as they are.

    Raises:
        FetchFailed: a known one that cannot be undone here.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding.strip().lower()
        if self._encoding in _NOT_READ:
            raise FetchFailed("wrong_content", f"compressed ({self._encoding}), unasked")
        self.is_compressed = self._encoding in _GZIP or self._encoding == "deflate"
        # None between streams: gzip may hold several, one after the other.
        self._stream: zlib._Decompress | None = None

    @property
    def is_whole(self) -> bool:
        """Whether what came so far ends where a stream ends."""
        return self._stream is None

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The bytes that this part of the body stands for, at most 64 KiB at once.

        Raises:
            FetchFailed: it is not compressed as the header says.
        """
        if not self.is_compressed:
            yield data
            return
        has_more = False
        while data or has_more:
            if self._stream is None:
                if not data:
                    return
                self._stream = zlib.decompressobj(self._window(data[0]))
            try:
                piece = self._stream.decompress(data, _PIECE_BYTES)
            except zlib.error:
                raise FetchFailed("wrong_content", "not compressed as its header says") from None
            # A full piece may have left bytes inside, also when all input is taken.
            has_more = len(piece) == _PIECE_BYTES
            data = self._stream.unconsumed_tail
            if self._stream.eof:
                data, self._stream = self._stream.unused_data, None
            if piece:
                yield piece

    def _window(self, first: int) -> int:
        """How zlib is told which header to expect (its `wbits`)."""
        if self._encoding in _GZIP:
            return 16 + zlib.MAX_WBITS
        # RFC 9110 means zlib's header by "deflate"; many servers leave it out.
        return zlib.MAX_WBITS if first & 0xF == 8 else -zlib.MAX_WBITS
