from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.corpus.caption_client import EndpointUnusable
from components.corpus.caption_models import Captioned
from components.corpus.captioning import CaptioningStopped

ROOT = Path(__file__).parents[3]

ENGLISH = "a calm lake below red hills"
CHINESE = "红色山丘下平静的湖"
KEY = "sk-very-secret-0123456789"
KEY_VARIABLE = "CAPTION_TEST_KEY"

Reply = tuple[int, dict[str, str], bytes]
# Classes of conftest.py.
Api = Any
Corpus = Any


def completion(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion that used 1,000 and 100 tokens."""
    body = {
        "model": "served",
        "choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
    }
    return 200, {}, json.dumps(body).encode()


def problem(status: int, message: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message}}).encode()


def statuses(captioned: Captioned) -> list[str | None]:
    return [row.status for row in captioned.rows]


def test_too_many_requests_hold_everything_back_as_long_as_asked(api: Api, corpus: Corpus) -> None:
    # Only the very first request is refused.
    api.respond = lambda body, n: (
        problem(429, "slow down", Retry_After="1") if len(api.bodies) == 1 else completion(ENGLISH)
    )
    result = corpus.write(api.settings(concurrency=1))
    assert statuses(result) == ["ok"] * 8
    assert len(api.bodies) == 9
    assert api.times[1] - api.times[0] >= 1.0


def test_requests_start_no_faster_than_allowed(api: Api, corpus: Corpus) -> None:
    corpus.write(api.settings(requests_per_minute=1200.0))
    assert max(api.times) - min(api.times) >= 7 * 0.05 - 0.04


@pytest.mark.parametrize(
    "bad",
    [
        problem(500, "oops"),
        problem(503, "busy", Retry_After="0"),
        (200, {}, b"<html>not JSON"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
        (200, {"Content-Length": "100000"}, b"{"),
    ],
)
def test_what_may_pass_is_asked_again(api: Api, corpus: Corpus, bad: Reply) -> None:
    api.respond = lambda body, n: bad if n == 0 else completion(ENGLISH)
    result = corpus.write(api.settings(timeout_s=0.5), kept=[True, *[False] * 7])
    assert statuses(result)[0] == "ok"
    assert api.asked == ["picture-0"] * 2


def test_what_does_not_pass_is_an_error_of_that_picture_alone(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: (
        problem(500, "broken") if api.picture_of(body) == "picture-3" else completion(ENGLISH)
    )
    result = corpus.write(api.settings(retries=1))
    assert statuses(result) == ["ok"] * 3 + ["error"] + ["ok"] * 4
    assert result.problems == ["HTTP 500: broken (2 attempts)"]
    assert api.asked.count("picture-3") == 2
    # Errors are not stored: the next run tries again.
    api.respond = lambda body, n: completion(ENGLISH)
    assert statuses(corpus.write(api.settings(retries=1))) == ["ok"] * 8


def test_a_request_that_is_refused_as_such_is_not_repeated(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: (
        problem(400, "too small") if api.picture_of(body) == "picture-3" else completion(ENGLISH)
    )
    result = corpus.write(api.settings())
    assert statuses(result)[3] == "error"
    assert result.problems == ["HTTP 400: too small"]
    assert api.asked.count("picture-3") == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (problem(401, f"Incorrect API key provided: {KEY}"), r"HTTP 401: the API key is refused"),
        (problem(403, "no"), r"HTTP 403.*check CAPTION_TEST_KEY"),
        (problem(404, "no"), "HTTP 404: no such address or model"),
        ((307, {"Location": "http://127.0.0.1:9/v1"}, b""), "HTTP 307: redirects elsewhere"),
        (problem(429, "daily quota", Retry_After="86400"), "come back in 86400 s"),
    ],
)
def test_an_endpoint_that_refuses_everything_stops_with_one_line(
    api: Api, corpus: Corpus, answer: Reply, message: str
) -> None:
    api.respond = lambda body, n: answer
    with pytest.raises(CaptioningStopped, match=message) as caught:
        corpus.write(api.settings(concurrency=2))
    assert "8 of 8 images are left" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(api.bodies) <= 2


def test_ten_failures_in_a_row_are_an_outage(
    make_corpus: Callable[[int], Corpus], api: Api
) -> None:
    corpus = make_corpus(30)
    api.respond = lambda body, n: (
        completion(ENGLISH) if len(api.bodies) <= 4 else problem(400, "Unknown name 'seed'")
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
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(EndpointUnusable, match=KEY_VARIABLE) as caught:
        corpus.write(api.settings())
    assert not key or key not in str(caught.value)
    assert api.bodies == []


def test_the_key_is_nowhere_but_in_the_header(
    api: Api, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    api.respond = lambda body, n: problem(400, f"bad header Bearer {KEY} in request")
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert result.problems == ["HTTP 400: bad header Bearer [key] in request"]
    api.respond = lambda body, n: completion(ENGLISH)
    corpus.write(api.settings())
    assert KEY not in caplog.text
    assert KEY not in repr(api.settings()) + repr(result)
    for path in corpus.folder.rglob("*"):
        assert KEY.encode() not in path.read_bytes(), path
