"""A careful client of the OpenAI-compatible chat completions API.

Every request goes cache -> budget -> rate limit -> HTTP. What happens next depends on the answer:

- 200 with a readable body: charged by its `usage`, stored, returned;
- 429, 5xx, 408, a lost connection, a timeout, a body that cannot be read: asked again after a pause
  (`Retry-After` holds back every thread), `retries` times, then `RequestFailed`;
- 400, 413, 422 and the like: `RequestFailed` at once, this picture only;
- 401, 402, 403, 404, redirects, an unusable key, a long `Retry-After`, or ten failed requests in a
  row: `EndpointUnusable`, nothing more is sent.

The API key is read from the environment, leaves this module in one header only and is cut out of
every message.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from components.chat.deadline import Deadline, bind
from components.chat.prompts import Prompt
from components.chat.request_cache import Answer, RequestCache
from components.chat.spending import Budget, Prices
from components.files.parquet_files import storable
from components.settings.captions import EndpointSettings

_MAX_BODY_BYTES = 4 * 2**20
_LONGEST_PAUSE_S = 60.0
# Above this a run is better ended and started again: a daily quota is used up.
_LONGEST_RETRY_AFTER_S = 600.0
_OUTAGE_REQUESTS = 10
# More than any context window: a count above is nonsense, and the estimate stands.
_MOST_TOKENS = 10**8
_DETAIL_CHARACTERS = 160
_STOPPING = {
    401: "the API key is refused",
    402: "payment is required",
    403: "access is denied",
    404: "no such address or model",
}


class EndpointUnusable(RuntimeError):
    """No request would succeed; one line saying why."""


class RequestFailed(RuntimeError):
    """This request has no answer; one line saying why."""


class _TryAgain(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Question:
    """One thing to ask."""

    image_id: str
    prompt: Prompt
    text: str | None = None
    """Appended to the prompt: the caption to translate."""
    jpeg: bytes | None = field(default=None, repr=False)
    picture: str | None = None
    """What identifies the picture besides image_id, such as the size of the derivative."""
    exhibits: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    """Several pictures as (caption, JPEG), each shown after its caption; image_id and picture must
    identify them all."""
    attempt: int = 0
    """0, or 1 for the second try after an answer failed its checks."""


def read_api_key(variable: str | None) -> str | None:
    """The key from the environment.

    Raises:
        EndpointUnusable: unset, or not a possible header value; the value is never shown.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointUnusable(f"environment variable {variable} is not set; put the API key there")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointUnusable(f"environment variable {variable} does not hold a usable API key")
    return key


def _parse_answer(data: bytes) -> Answer:
    """Raises `_TryAgain` when the body is not a chat completion."""
    try:
        body = json.loads(data)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal") or ""
        reason = str(choice.get("finish_reason") or "stop")
        usage = body.get("usage") or {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _TryAgain("answer is not a chat completion") from None
    if not isinstance(text, str) or not isinstance(refusal, str):
        raise _TryAgain("answer is not text")
    if refusal or reason == "content_filter":
        text, reason = text or refusal, "refusal"
    counts = [
        n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST_TOKENS else None
        for n in tokens
    ]
    return Answer(storable(text), storable(reason), *counts)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a `Retry-After` header: a number or an HTTP date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


class _Pace:
    """Start times of requests: evenly spaced, and held back together when the server asks."""

    def __init__(self, requests_per_minute: float) -> None:
        self._interval_s = 60.0 / requests_per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Sleep until this thread's turn; earlier when `stop` is set."""
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._interval_s
        stop.wait(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Let no request start before `seconds` from now."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class ChatClient:
    """One model behind one endpoint; threads may share it."""

    def __init__(
        self,
        settings: EndpointSettings,
        prompt: Prompt,
        cache: RequestCache,
        budget: Budget,
        *,
        pause_s: float = 0.5,
    ) -> None:
        """Read the key; nothing is sent.

        Args:
            settings: of the endpoint.
            prompt: sent with every question.
            cache: of answers.
            budget: charged before requests.
            pause_s: before the first retry; doubles with each further one.

        Raises:
            EndpointUnusable: the key is missing.
        """
        self._settings = settings
        self._key = read_api_key(settings.api_key_env)
        self._cache = cache
        self._budget = budget
        self._pause_s = pause_s
        self._pace = _Pace(settings.requests_per_minute)
        # Without a cap, prices may be unknown: then nothing is charged and no sum is reported.
        self._prices = Prices(
            settings.input_usd_per_million or 0.0,
            settings.output_usd_per_million or 0.0,
            settings.max_tokens,
        )
        self.job = job_of(settings, prompt)
        self._failures = 0
        self._lock = threading.Lock()
        self._verdict = "stopped"
        self.stop = threading.Event()
        """Set: no further request is sent."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(
            headers=headers,
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        self._deadline = Deadline()
        bind(self._http, self._deadline)

    def __repr__(self) -> str:
        return f"ChatClient({self._settings.model!r} at {self._settings.base_url!r})"

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def knows(self, question: Question) -> bool:
        """Whether the answer is stored already."""
        return self._cache.get(self._cache_key(question)) is not None

    def ask(self, question: Question) -> Answer:
        """The stored or a fresh answer.

        Raises:
            RequestFailed: this question has no answer.
            EndpointUnusable: no question would have one.
            CostCapReached: a request might pass the cap.
        """
        key = self._cache_key(question)
        answer = self._cache.get(key)
        if answer is not None:
            return answer
        try:
            return self._ask(self._body(question), key)
        except EndpointUnusable as problem:
            with self._lock:
                # The other threads stop at once, for the same reason.
                if not self.stop.is_set():
                    self._verdict = str(problem)
                    self.stop.set()
                verdict = self._verdict
            raise EndpointUnusable(verdict) from None

    def _ask(self, body: bytes, key: str) -> Answer:
        """A fresh answer, with retries."""
        for attempt in range(self._settings.retries + 1):
            self._pace.wait(self.stop)
            if self.stop.is_set():
                raise EndpointUnusable(self._verdict)
            try:
                answer = self._request(body, key)
            except _TryAgain as problem:
                failure = str(problem)
                if attempt < self._settings.retries:
                    self._pause(problem, attempt)
            except RequestFailed as problem:
                self._count_failure(str(problem))
                raise
            else:
                with self._lock:
                    self._failures = 0
                return answer
        self._count_failure(failure)
        raise RequestFailed(f"{failure} ({self._settings.retries + 1} attempts)")

    def _count_failure(self, reason: str) -> None:
        """Ten in a row are not about the pictures."""
        with self._lock:
            self._failures += 1
            if self._failures >= _OUTAGE_REQUESTS:
                raise EndpointUnusable(f"{_OUTAGE_REQUESTS} requests in a row failed: {reason}")

    def _pause(self, problem: _TryAgain, attempt: int) -> None:
        if problem.retry_after_s is None:
            self.stop.wait(min(self._pause_s * 2**attempt, _LONGEST_PAUSE_S))
        elif problem.retry_after_s > _LONGEST_RETRY_AFTER_S:
            raise EndpointUnusable(f"asks to come back in {problem.retry_after_s:.0f} s")
        else:
            self._pace.hold(problem.retry_after_s)

    def _cache_key(self, question: Question) -> str:
        parts = [
            self.job,
            question.image_id,
            question.picture,
            question.text,
            question.attempt,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _body(self, question: Question) -> bytes:
        text = question.prompt.text
        if question.text is not None:
            text = f"{text}\n\n{question.text}"
        content: Any = text
        if question.jpeg is not None:
            url = "data:image/jpeg;base64," + base64.b64encode(question.jpeg).decode()
            content = [
                {"type": "text", "text": text},
                {"type": "image_url", "image_url": {"url": url}},
            ]
        if question.exhibits:
            content = [{"type": "text", "text": text}]
            for caption, jpeg in question.exhibits:
                url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
                content.append({"type": "text", "text": caption})
                content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        if question.prompt.system:
            messages.insert(0, {"role": "system", "content": question.prompt.system})
        body = {"messages": messages, **_parameters(self._settings)}
        if self._settings.seed is not None:
            body["seed"] = self._settings.seed + question.attempt
        return json.dumps(body).encode()

    def _request(self, body: bytes, key: str) -> Answer:
        """One charged HTTP request."""
        charge = self._budget.reserve(self.job, self._prices)
        was_billed, is_settled = True, False
        try:
            status, headers, data = self._post(body)
            was_billed = status == httpx.codes.OK
            self._judge(status, headers, data)
            answer = _parse_answer(data)
            is_settled = True
            self._budget.settle(charge, self.job, self._prices, key, answer)
            return answer
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as problem:
            was_billed = False
            raise _TryAgain(f"cannot connect: {self._clean(str(problem))}") from None
        except httpx.TimeoutException:
            raise _TryAgain(f"no answer within {self._settings.timeout_s:g} s") from None
        except httpx.HTTPError as problem:
            raise _TryAgain(f"connection lost: {type(problem).__name__}") from None
        except httpx.InvalidURL:
            was_billed = False
            raise EndpointUnusable("base_url is not a usable address") from None
        finally:
            if not is_settled:
                self._budget.release(charge, was_billed=was_billed)

    def _post(self, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; time and size of the whole exchange are bounded."""
        self._deadline.start(self._settings.timeout_s)
        url = f"{self._settings.base_url.rstrip('/')}/chat/completions"
        data = bytearray()
        headers = {"Content-Type": "application/json"}
        with self._http.stream("POST", url, content=body, headers=headers) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > _MAX_BODY_BYTES:
                    raise _TryAgain(f"answer is longer than {_MAX_BODY_BYTES} bytes")
            return response.status_code, response.headers, bytes(data)

    def _judge(self, status: int, headers: httpx.Headers, data: bytes) -> None:
        """Raise what a status other than 200 means."""
        if status == httpx.codes.OK:
            return
        if status in _STOPPING:
            hint = f"; check {self._settings.api_key_env}" if self._settings.api_key_env else ""
            raise EndpointUnusable(f"HTTP {status}: {_STOPPING[status]}{hint}")
        if 300 <= status < 400:
            # Not followed: the key belongs to this host alone.
            raise EndpointUnusable(f"HTTP {status}: redirects elsewhere; correct base_url")
        detail = f"HTTP {status}"
        if message := self._error_message(data):
            detail += f": {message}"
        if status in (408, 429) or status >= 500:
            raise _TryAgain(detail, retry_after_s=_retry_after_s(headers.get("retry-after")))
        raise RequestFailed(detail)

    def _error_message(self, data: bytes) -> str:
        """The server's own words, where they come as JSON; some wrap the object in a list."""
        try:
            body = json.loads(data)
            body = body[0] if isinstance(body, list) else body
            error = body.get("error", body)
            message = error.get("message") if isinstance(error, dict) else error
        except (ValueError, LookupError, AttributeError, RecursionError):
            return ""
        return self._clean(message) if isinstance(message, str) else ""

    def _clean(self, text: str) -> str:
        """One short line without the key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = " ".join(text.split())
        return text if len(text) <= _DETAIL_CHARACTERS else text[:_DETAIL_CHARACTERS] + "..."


def _parameters(settings: EndpointSettings) -> dict[str, Any]:
    """Model and sampling parameters as the API names them."""
    parameters: dict[str, Any] = {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
    }
    if settings.reasoning_effort is not None:
        parameters["reasoning_effort"] = settings.reasoning_effort
    return parameters


def job_of(settings: EndpointSettings, prompt: Prompt) -> str:
    """Digest of prompt, model and parameters: what makes two answers comparable.

    The address is not part of it: the same model on another host is not asked again.
    """
    parts: list[Any] = [prompt.version, prompt.text, _parameters(settings), settings.seed]
    if prompt.system:
        parts.append(prompt.system)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
