"""A scorer in a process of its own behind HTTP, for models that need another environment.

Version 1, JSON over HTTP:

- `GET /identity` -> {"protocol": 1, "scorer": name, "weights": sha256}
- `POST /score`, body: JPEG bytes (Content-Type image/jpeg)
  -> {"protocol": 1, "scorer": name, "weights": sha256, "score": number}
- errors: 400 (a picture that cannot be scored), 404, 413, 500, each {"error": one line}
- 503 {"error": one line}, Retry-After: seconds, while the model loads: ask again

Every answer repeats the identity, so a server that was restarted with other weights in the middle
of a corpus is noticed at the first item and its scores never mix with those before.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import httpx

PROTOCOL = 1
MAX_JPEG_BYTES = 32 * 2**20

_CONNECT_TIMEOUT_S = 5.0
_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 5.0
LOADING_STATUS = 503


class ScorerUnavailable(RuntimeError):
    """The server does not answer, or does not speak this protocol; one line."""


class ScorerChanged(RuntimeError):
    """Another scorer or other weights than the run began with."""


class ItemRejected(ValueError):
    """The scorer says that this picture cannot be scored; another attempt would not help."""


@dataclass(frozen=True)
class ScorerIdentity:
    """What makes the scores."""

    scorer: str
    weights: str
    """sha256 of the weights."""


def _identity(answer: Any, url: str) -> ScorerIdentity:
    if not isinstance(answer, dict) or "protocol" not in answer:
        raise ScorerUnavailable(f"{url}: not a scorer server")
    if answer["protocol"] != PROTOCOL:
        raise ScorerUnavailable(
            f"{url}: the server speaks protocol {answer['protocol']!r}, this client {PROTOCOL}; "
            "run both from the same version"
        )
    scorer, weights = answer.get("scorer"), answer.get("weights")
    if not isinstance(scorer, str) or not isinstance(weights, str) or not scorer or not weights:
        raise ScorerUnavailable(f"{url}: answers without scorer name or weights")
    return ScorerIdentity(scorer, weights)


class ScorerClient:
    """Asks one server, patiently."""

    def __init__(
        self, url: str, *, timeout_s: float = 120.0, retries: int = 5, loading_s: float = 1800.0
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: such as http://127.0.0.1:8765, without a path.
            timeout_s: of one request.
            retries: further attempts after a lost connection, a timeout, or status 429 or 5xx.
            loading_s: how long to wait for a server that is loading its model.
        """
        self._url = url.rstrip("/")
        self._retries = retries
        self._loading_s = loading_s
        # Scorers are neighbours: proxies of the environment are for the world outside.
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S), trust_env=False
        )

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()

    def _answer(self, method: str, path: str, jpeg: bytes | None) -> httpx.Response:
        """One answer that is not about loading.

        Raises:
            httpx.HTTPError: no answer.
            ScorerUnavailable: still loading after the time for it.
        """
        headers = {"Content-Type": "image/jpeg"} if jpeg is not None else None
        deadline = time.monotonic() + self._loading_s
        while True:
            answer = self._http.request(method, f"{self._url}{path}", content=jpeg, headers=headers)
            if answer.status_code != LOADING_STATUS:
                return answer
            if time.monotonic() >= deadline:
                raise ScorerUnavailable(
                    f"{self._url}{path}: still loading after {self._loading_s:g} s"
                )
            wait_s = answer.headers.get("Retry-After", "")
            time.sleep(min(_MAX_BACKOFF_S, float(wait_s) if wait_s.isdigit() else _BACKOFF_S))

    def _ask(self, method: str, path: str, jpeg: bytes | None = None) -> Any:
        problem = "no answer"
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** (attempt - 1)))
            try:
                answer = self._answer(method, path, jpeg)
                body = answer.json()
            except httpx.HTTPError as lost:
                problem = str(lost) or type(lost).__name__
                continue
            except ValueError:
                problem = "an answer that is not JSON"
                continue
            if answer.status_code == 200:
                return body
            detail = str(body.get("error", "")) if isinstance(body, dict) else ""
            problem = f"status {answer.status_code} {detail}".strip()
            # Of the picture: the engine counts it as a rejected item and goes on.
            if answer.status_code in (400, 413):
                raise ItemRejected(detail or problem)
            # 404 and its like: another kind of server, which will not become one by asking again.
            if answer.status_code != 429 and answer.status_code < 500:
                break
        raise ScorerUnavailable(f"{self._url}{path}: {problem}")

    def identity(self) -> ScorerIdentity:
        """Name and weights of the scorer.

        Raises:
            ScorerUnavailable: no server, or another kind of server.
        """
        return _identity(self._ask("GET", "/identity"), self._url)

    def score(self, jpeg: bytes, expected: ScorerIdentity) -> float:
        """The score of one JPEG.

        Raises:
            ItemRejected: the picture cannot be scored.
            ScorerChanged: the answer comes from something else than `expected`.
            ScorerUnavailable: no usable answer after all attempts.
        """
        answer = self._ask("POST", "/score", jpeg)
        found = _identity(answer, self._url)
        if found != expected:
            raise ScorerChanged(
                f"{self._url}: scores come from {found.scorer} ({found.weights[:12]}), the run "
                f"began with {expected.scorer} ({expected.weights[:12]})"
            )
        score = answer.get("score")
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ScorerUnavailable(f"{self._url}/score: score is {score!r}, not a finite number")
        return float(score)
