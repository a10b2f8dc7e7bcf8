"""Bodies that come compressed although the bytes as they are were asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from components.corpus.sources.download_journal import FetchFailed

_GZIP = frozenset({"gzip", "x-gzip"})
_NOT_READ = frozenset({"br", "zstd"})
_PIECE_BYTES = 65536
"""A bomb is refused by its size while it unfolds, so little of it may unfold at once."""


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
