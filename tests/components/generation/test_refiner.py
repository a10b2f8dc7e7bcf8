"""The prompt refiner against a real HTTP server: formats, 1:1 count, length, cache, fallbacks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.chat.client import EndpointUnusable
from components.generation.refiner import (
    AnswerMalformed,
    Refined,
    check_refined,
    parse_answer,
    refine_prompts,
    word_count,
)
from components.settings.evaluation import RefinerSettings

GOOD = " ".join(["luminous"] * 60)


class Endpoint:
    """`answer(short prompts, requests before)` gives (text, finish reason) or a status."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[list[str], int], tuple[str, str] | int] = lambda prompts, n: (
            json.dumps([f"{prompt} {GOOD}" for prompt in prompts]),
            "stop",
        )

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                length = int(handler.headers["Content-Length"])
                body = json.loads(handler.rfile.read(length))
                text = body["messages"][1]["content"]
                prompts = json.loads(text.rsplit("Short prompts: ", 1)[1])
                found = self.answer(prompts, len(self.bodies))
                self.bodies.append(body)
                status, data = 200, b""
                if isinstance(found, int):
                    status = found
                else:
                    choice = {"message": {"content": found[0]}, "finish_reason": found[1]}
                    data = json.dumps({"choices": [choice]}).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def settings(self, **changes: object) -> RefinerSettings:
        return RefinerSettings.model_validate(
            {
                "endpoint": {
                    "base_url": f"http://127.0.0.1:{self.server.server_port}/v1",
                    "model": "some/llm",
                    "api_key_env": None,
                    "temperature": 0.5,
                    "max_tokens": 500,
                    "seed": 3,
                    "reasoning_effort": None,
                    "requests_per_minute": 60000.0,
                    "concurrency": 1,
                    "timeout_s": 5.0,
                    "retries": 0,
                    "input_usd_per_million": 0.0,
                    "output_usd_per_million": 0.0,
                },
                "language": "English",
                "min_words": 55,
                "max_words": 100,
                "prompt_file": None,
                "batch_size": 4,
                "max_cost_usd": 1.0,
            }
            | changes
        )


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def refine(
    endpoint: Endpoint, folder: Path, prompts: list[str], **changes: object
) -> list[Refined]:
    settings = endpoint.settings(**changes)
    return refine_prompts(prompts, settings, cache=folder / "cache.sqlite", root=folder)


def test_prompts_are_refined_one_to_one_in_batches_and_answers_are_kept(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    prompts = ["a lake", "a tree", "a lake", "雪山", "x", "y", "z"]
    first = refine(endpoint, tmp_path, prompts)
    assert [r.prompt for r in first] == [f"{prompt} {GOOD}" for prompt in prompts]
    assert not any(r.reason for r in first)
    assert len(endpoint.bodies) == 2
    roles = [message["role"] for message in endpoint.bodies[0]["messages"]]
    assert roles == ["system", "user"]
    assert "55 to 100 words" in endpoint.bodies[0]["messages"][0]["content"]
    assert refine(endpoint, tmp_path, prompts) == first
    assert len(endpoint.bodies) == 2


@pytest.mark.parametrize(
    "text",
    [
        '["first", "second"]',
        '```json\n["first",\n "second"]\n```',
        "first\nsecond",
        '1. "first"\n\n2. "second"\n',
        "- first\n- second",
    ],
)
def test_both_answer_formats_are_read(text: str) -> None:
    assert parse_answer(text, 2) == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('["one"]', "1 prompts instead of 2"),
        ("one\ntwo\nthree", "3 prompts instead of 2"),
        ('["one", "two"', "not a JSON list"),
        ('["one", 2]', "something else than texts"),
    ],
)
def test_other_answers_are_malformed(text: str, problem: str) -> None:
    with pytest.raises(AnswerMalformed, match=problem):
        parse_answer(text, 2)


def test_a_batch_of_the_wrong_length_is_asked_prompt_by_prompt(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.answer = lambda prompts, n: (
        (GOOD, "stop") if len(prompts) > 1 else (f"{prompts[0]} {GOOD}", "stop")
    )
    found = refine(endpoint, tmp_path, ["a", "b"])
    assert [r.prompt for r in found] == [f"a {GOOD}", f"b {GOOD}"]
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (("too short", "stop"), "2 words, not 55 to 100"),
        (("I'm sorry, I can't help with that.", "stop"), "refused"),
        ((GOOD, "content_filter"), "refused"),
        ((GOOD, "length"), "cut off at refiner.endpoint.max_tokens"),
        (('["unfinished', "stop"), "not a JSON list"),
        (500, "HTTP 500"),
    ],
)
def test_what_fails_twice_keeps_the_original_prompt_and_says_why(
    endpoint: Endpoint, tmp_path: Path, answer: tuple[str, str] | int, reason: str
) -> None:
    endpoint.answer = lambda prompts, n: answer
    found = refine(endpoint, tmp_path, ["a lake"])[0]
    assert (found.original, found.prompt) == ("a lake", "a lake")
    assert reason in found.reason
    assert len(endpoint.bodies) == 2


def test_an_endpoint_of_no_use_is_an_error(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompts, n: 404
    with pytest.raises(EndpointUnusable, match="no such address or model"):
        refine(endpoint, tmp_path, ["a lake"])


def test_a_prompt_file_replaces_the_system_prompt(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Be brief.\n")
    refine(endpoint, tmp_path, ["a lake"], prompt_file="mine.txt")
    assert endpoint.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ValueError, match=r"refiner\.prompt_file: none\.txt"):
        refine(endpoint, tmp_path, ["a lake"], prompt_file="none.txt")


def test_chinese_length_is_counted_in_words_worth_of_characters(endpoint: Endpoint) -> None:
    assert word_count("a calm lake") == 3
    assert word_count("湖" * 180) == pytest.approx(100)
    assert check_refined("湖" * 144, endpoint.settings(language="Chinese")) == ""
