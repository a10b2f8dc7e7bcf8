"""Servers that are slow in ways that no limit of a single read or write meets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from components.chat.deadline import Deadline, bind

Serve = Callable[[socket.socket], None]


def trickle_headers(connection: socket.socket) -> None:
    connection.recv(2**16)
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100:
        time.sleep(0.05)
        connection.sendall(bytes([byte]))


def trickle_body(connection: socket.socket) -> None:
    connection.recv(2**16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        time.sleep(0.05)
        connection.sendall(b"x")


def read_slowly(connection: socket.socket) -> None:
    while connection.recv(2**14):
        time.sleep(0.05)


def address_of(serve: Serve) -> str:
    """Of a server that takes one connection and treats it as `serve` does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listener, listener.accept()[0] as connection, contextlib.suppress(OSError):
            serve(connection)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize("serve", [trickle_headers, trickle_body, read_slowly])
@pytest.mark.parametrize("is_proxy", [False, True])
def test_an_exchange_ends_by_its_deadline_whatever_comes_or_goes_slowly(
    serve: Serve, is_proxy: bool
) -> None:
    address = address_of(serve)
    deadline = Deadline()
    with httpx.Client(timeout=30.0, proxy=address if is_proxy else None) as client:
        bind(client, deadline)
        start = time.monotonic()
        deadline.start(0.3)
        with pytest.raises(httpx.TimeoutException):
            client.post("http://127.0.0.1:9/v1" if is_proxy else address, content=bytes(2**25))
        assert 0.25 < time.monotonic() - start < 2


def test_the_time_limit_of_a_request_holds_for_its_headers(api: Any, corpus: Any) -> None:
    settings = api.settings(base_url=address_of(trickle_headers), timeout_s=0.3, retries=0)
    result = corpus.write(settings, kept=[True, *[False] * 7])
    assert result.problems == ["no answer within 0.3 s (1 attempts)"]
