from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.chat.client import EndpointUnusable
from components.corpus.captions.writing import CaptioningStopped

ROOT = Path(__file__).parents[3]

# Classes of conftest.py.
Api = Any
Corpus = Any
Reply = tuple[int, dict[str, str], bytes]


def test_too_many_requests_hold_everything_back_as_long_as_asked(api: Api, corpus: Corpus) -> None:
    # Only the very first request is refused.
    api.respond = lambda body, n: (
        api.problem(429, "slow down", Retry_After="1")
        if len(api.bodies) == 1
        else api.completion(api.english)
    )
    result = corpus.write(api.settings(concurrency=1))
    assert corpus.statuses(result) == ["ok"] * 8
    assert len(api.bodies) == 9
    assert api.times[1] - api.times[0] >= 1.0


def test_requests_start_no_faster_than_allowed(api: Api, corpus: Corpus) -> None:
    corpus.write(api.settings(requests_per_minute=1200.0))
    assert max(api.times) - min(api.times) >= 7 * 0.05 - 0.04


@pytest.mark.parametrize(
    "bad",
    [
        lambda api: api.problem(500, "oops"),
        lambda api: api.problem(408, "you were slow"),
        lambda api: api.problem(503, "busy", Retry_After="0"),
        lambda api: api.problem(429, "busy", Retry_After="Fri, 31 Dec 1999 00:00:00 GMT"),
        lambda api: (200, {}, b"<html>not JSON"),
        lambda api: (200, {}, b'{"choices": []}'),
        lambda api: (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        lambda api: (200, {}, b"[" * 200_000),
        lambda api: (200, {}, b"\xff\xfe{}"),
        lambda api: (200, {}, api.completion(api.english)[2][:-20]),
        lambda api: (200, {"Content-Encoding": "gzip"}, b"no gzip"),
        lambda api: (200, {"Content-Length": "100000"}, b"{"),
    ],
)
def test_what_may_pass_is_asked_again(
    api: Api, corpus: Corpus, bad: Callable[[Api], Reply]
) -> None:
    api.respond = lambda body, n: bad(api) if n == 0 else api.completion(api.english)
    result = corpus.write(api.settings(timeout_s=0.5), kept=[True, *[False] * 7])
    assert corpus.statuses(result)[0] == "ok"
    assert api.asked == ["picture-0"] * 2


def test_what_does_not_pass_is_an_error_of_that_picture_alone(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: (
        api.problem(500, "broken")
        if api.picture_of(body) == "picture-3"
        else api.completion(api.english)
    )
    result = corpus.write(api.settings(retries=1))
    assert corpus.statuses(result) == ["ok"] * 3 + ["error"] + ["ok"] * 4
    assert result.problems == ["HTTP 500: broken (2 attempts)"]
    assert api.asked.count("picture-3") == 2
    # Errors are not stored: the next run tries again.
    api.respond = lambda body, n: api.completion(api.english)
    assert corpus.statuses(corpus.write(api.settings(retries=1))) == ["ok"] * 8


def test_a_request_that_is_refused_as_such_is_not_repeated(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: (
        api.problem(400, "too small")
        if api.picture_of(body) == "picture-3"
        else api.completion(api.english)
    )
    result = corpus.write(api.settings())
    assert corpus.statuses(result)[3] == "error"
    assert result.problems == ["HTTP 400: too small"]
    assert api.asked.count("picture-3") == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda api: api.problem(401, f"Incorrect API key provided: {api.key}"),
            r"HTTP 401: the API key is refused",
        ),
        (lambda api: api.problem(402, "no credit"), "HTTP 402: payment is required"),
        (lambda api: api.problem(403, "no"), r"HTTP 403.*check CAPTION_TEST_KEY"),
        (lambda api: api.problem(404, "no"), "HTTP 404: no such address or model"),
        (
            lambda api: (307, {"Location": "http://127.0.0.1:9/v1"}, b""),
            "HTTP 307: redirects elsewhere",
        ),
        (
            lambda api: api.problem(429, "daily quota", Retry_After="86400"),
            "come back in 86400 s",
        ),
    ],
)
def test_an_endpoint_that_refuses_everything_stops_with_one_line(
    api: Api, corpus: Corpus, answer: Callable[[Api], Reply], message: str
) -> None:
    api.respond = lambda body, n: answer(api)
    with pytest.raises(CaptioningStopped, match=message) as caught:
        corpus.write(api.settings(concurrency=2))
    assert "8 of 8 images are left" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert api.key not in str(caught.value)
    assert len(api.bodies) <= 2


def test_ten_failures_in_a_row_are_an_outage(
    make_corpus: Callable[[int], Corpus], api: Api
) -> None:
    corpus = make_corpus(30)
    api.respond = lambda body, n: (
        api.completion(api.english)
        if len(api.bodies) <= 4
        else api.problem(400, "Unknown name 'seed'")
    )
    with pytest.raises(CaptioningStopped, match=r"10 requests in a row failed: .*'seed'") as caught:
        corpus.write(api.settings(concurrency=1))
    assert "are left to caption" in str(caught.value)
    assert len(api.bodies) == 14


def test_nobody_listening_is_said(api: Api, corpus: Corpus) -> None:
    nowhere = api.settings(base_url="http://127.0.0.1:9/v1", retries=0)
    result = corpus.write(nowhere, kept=[True, *[False] * 7])
    assert result.problems[0].startswith("cannot connect: ")
    assert result.spent_usd == 0


@pytest.mark.parametrize("key", ["", "two words", "umlaut-ä", "line\nbreak"])
def test_an_unusable_key_is_named_by_its_variable_alone(
    api: Api, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(api.key_variable, key)
    with pytest.raises(EndpointUnusable, match=api.key_variable) as caught:
        corpus.write(api.settings())
    assert not key or key not in str(caught.value)
    assert api.bodies == []


def test_the_key_is_nowhere_but_in_the_header(
    api: Api, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    api.respond = lambda body, n: api.problem(400, f"bad header Bearer {api.key} in request")
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert result.problems == ["HTTP 400: bad header Bearer [key] in request"]
    api.respond = lambda body, n: api.completion(api.english)
    corpus.write(api.settings())
    assert api.key not in caplog.text
    assert api.key not in repr(api.settings()) + repr(result)
    for path in corpus.folder.rglob("*"):
        assert api.key.encode() not in path.read_bytes(), path


def test_a_body_that_trickles_ends_at_the_time_limit(api: Api, corpus: Corpus) -> None:
    def trickle() -> Iterator[bytes]:
        for byte in api.completion(api.english)[2]:
            time.sleep(0.02)
            yield bytes([byte])

    api.respond = lambda body, n: (200, {"Transfer-Encoding": "chunked"}, trickle())
    result = corpus.write(api.settings(timeout_s=0.3, retries=0), kept=[True, *[False] * 7])
    assert result.problems == ["no answer within 0.3 s (1 attempts)"]


def test_text_and_counts_that_no_database_holds_are_made_harmless(api: Api, corpus: Corpus) -> None:
    answer = {
        "choices": [{"message": {"content": "a calm lake \ud800 below red hills"}}],
        "usage": {"prompt_tokens": 10**30, "completion_tokens": -5},
    }
    api.respond = lambda body, n: (200, {}, json.dumps(answer).encode())
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert result.rows[0].english == "a calm lake \ufffd below red hills"
    # Half a character could not be read, so it is asked for once more. The estimate stands: 2,000
    # assumed and 200 allowed tokens.
    assert result.spent_usd == pytest.approx(0.008)
