"""Exchanges over httpx that end by a deadline, however slowly their bytes come and go.

httpx limits a connection's attempts, reads and writes one by one: a server that sends a byte of its
headers a second is never late. Here each of them gets what is left of the whole.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx

# As many as a record of TLS holds, which is written as a whole or not.
_WRITE_BYTES = 2**14


class Deadline(threading.local):
    """Of the exchange that this thread is at; httpx does a request's work in the calling thread."""

    _end = 0.0

    def start(self, seconds: float) -> None:
        """Let what follows in this thread end after `seconds`."""
        self._end = time.monotonic() + seconds

    def left_s(self, timeout: type[httpx.TimeoutException]) -> float:
        """What is left, above 0.

        Raises:
            TimeoutException: of the given kind; nothing is left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise timeout("past the deadline")
        return left


def bind(client: httpx.Client, deadline: Deadline) -> None:
    """Let every exchange of `client`, through proxies too, end by the deadline of its thread."""
    # httpcore takes a backend where its pool is made; httpx, which makes it, hands none on.
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            pool: Any = transport._pool
            pool._network_backend = _Backend(pool._network_backend, deadline)


class _Backend:
    """Makes connections for httpcore, as `httpcore.NetworkBackend` does; its timeouts are ours."""

    def __init__(self, inner: Any, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def connect_tcp(
        self, host: str, port: int, *, timeout: float | None = None, **more: Any
    ) -> Any:
        try:
            addresses = len(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError:
            addresses = 1
        # They are tried one after another, each as long as is said here.
        seconds = self._deadline.left_s(httpx.ConnectTimeout) / addresses
        stream = self._inner.connect_tcp(host, port, timeout=seconds, **more)
        return _Stream(stream, self._deadline)


class _Stream:
    """A connection, as `httpcore.NetworkStream` is one."""

    def __init__(self, inner: Any, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def start_tls(self, *, timeout: float | None = None, **more: Any) -> Any:
        seconds = self._deadline.left_s(httpx.ConnectTimeout)
        return _Stream(self._inner.start_tls(timeout=seconds, **more), self._deadline)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._inner.read(max_bytes, self._deadline.left_s(httpx.ReadTimeout))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            seconds = self._deadline.left_s(httpx.WriteTimeout)
            self._inner.write(buffer[start : start + _WRITE_BYTES], seconds)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def close(self) -> None:
        self._inner.close()
