"""Notices that the Prefect server under a running pipeline has gone.

Prefect's client tries a server that is away again for minutes, at each of a run's many requests.
The server shows what the pipeline does; the pipeline must not wait for it.
"""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

POLL_S = 1.0
ANSWER_S = 5.0
REFUSALS = 2
"""Refused connections in a row after which a server is gone: one may be its restart's."""
SILENCE_S = 60.0
"""A server that accepts connections and answers nothing is busy until then."""


@contextmanager
def watch_server(api_url: str) -> Iterator[threading.Event]:
    """Watch a server while the block runs.

    Args:
        api_url: PREFECT_API_URL.

    Yields:
        An event that is set, once and for ever, when the server has gone: 2 to 4 s after its
        process ended, or after a minute without any answer.
    """
    gone, over = threading.Event(), threading.Event()

    def watch() -> None:
        refusals, heard = 0, time.monotonic()
        while not over.wait(POLL_S):
            try:
                # Anything that it says, a refusal included, is a sign of life.
                urllib.request.urlopen(f"{api_url}/health", timeout=ANSWER_S).close()
            except urllib.error.HTTPError:
                refusals, heard = 0, time.monotonic()
            except OSError as problem:
                # Also closed without a word, as a tunnel does whose other end has gone.
                refused = isinstance(getattr(problem, "reason", problem), ConnectionError)
                refusals = refusals + 1 if refused else 0
            except HTTPException:
                refusals, heard = 0, time.monotonic()
            else:
                refusals, heard = 0, time.monotonic()
            if refusals >= REFUSALS or time.monotonic() - heard > SILENCE_S:
                gone.set()
                return

    watcher = threading.Thread(target=watch, name="prefect-server-watch", daemon=True)
    watcher.start()
    try:
        yield gone
    finally:
        over.set()
