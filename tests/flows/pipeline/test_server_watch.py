"""What counts as a sign of life of a Prefect server, and what is said where there is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from flows.pipeline import server_watch
from flows.services.prefect_connection import connect_to_prefect
from flows.services.servers import ServiceError


@pytest.fixture
def listener() -> Iterator[Callable[[bytes], str]]:
    """Starts a program that says some bytes to everybody and hangs up; gives an API's address."""
    places: list[socket.socket] = []

    def start(answer: bytes) -> str:
        listens = socket.create_server(("127.0.0.1", 0))
        places.append(listens)

        def talk() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listens.accept()
                    with caller:
                        caller.recv(4096)
                        caller.sendall(answer)

        threading.Thread(target=talk, daemon=True).start()
        return f"http://127.0.0.1:{listens.getsockname()[1]}/api"

    yield start
    for place in places:
        place.close()


@pytest.mark.parametrize(("answer", "is_gone"), [(b"", True), (b"SSH-2.0-OpenSSH_9\r\n", False)])
def test_a_connection_that_is_closed_without_a_word_is_no_sign_of_life(
    listener: Callable[[bytes], str],
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
    is_gone: bool,
) -> None:
    monkeypatch.setattr(server_watch, "POLL_S", 0.02)
    with server_watch.watch_server(listener(answer)) as gone:
        assert gone.wait(10.0 if is_gone else 0.5) is is_gone


def test_who_says_nothing_is_no_other_program(
    listener: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (listener(b""), "http://127.0.0.1:port/api"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        with pytest.raises(ServiceError, match="no Prefect server answers"):
            connect_to_prefect(None)
