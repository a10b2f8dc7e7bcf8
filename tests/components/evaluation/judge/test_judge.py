"""The pairwise judge against a real HTTP server that misbehaves, and what it shows."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from components.evaluation.judge.exhibits import detailed_places, exhibits
from components.evaluation.judge.judge import JudgeStopped, Pair, judge_pairs, summarise
from components.evaluation.judge.prompts import AnswerInvalid, judge_prompt, parse_verdict
from components.settings.captions import EndpointSettings
from flows.cli import app
from flows.commands.images import judge as judge_command

Reply = tuple[int, dict[str, str], Any]


def verdict(preferred: str, **changes: Any) -> str:
    return json.dumps(
        {"preferred": preferred, "a_score": 60, "b_score": 40.5, "reasons": "clear"} | changes
    )


def shades(body: dict[str, Any]) -> list[int]:
    """Mean shade of picture A and of picture B, as the judge sees them."""
    parts = body["messages"][0]["content"]
    wholes = [
        after
        for before, after in itertools.pairwise(parts)
        if before.get("text", "").endswith("whole:")
    ]
    data = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in wholes]
    return [round(float(np.asarray(Image.open(io.BytesIO(one))).mean())) for one in data]


class Server:
    """`respond(body, times this very body was sent)` gives status, headers and text."""

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any], int], Reply] = lambda body, n: (200, {}, "")
        self.bodies: list[dict[str, Any]] = []
        seen: Counter[str] = Counter()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                raw = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
                body = json.loads(raw)
                with lock:
                    count = seen[raw]
                    seen[raw] += 1
                    self.bodies.append(body)
                status, headers, text = self.respond(body, count)
                answer = {
                    "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
                }
                data = text if isinstance(text, bytes) else json.dumps(answer).encode()
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def endpoint(self, **changes: Any) -> EndpointSettings:
        return EndpointSettings(
            **{
                "base_url": self.url,
                "model": "some/vlm",
                "api_key_env": None,
                "temperature": 0.0,
                "max_tokens": 200,
                "seed": 0,
                "reasoning_effort": None,
                "requests_per_minute": 60000.0,
                "concurrency": 4,
                "timeout_s": 5.0,
                "retries": 2,
                "input_usd_per_million": 1.0,
                "output_usd_per_million": 10.0,
            }
            | changes
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Eight pairs; the pictures of A are brighter."""
    made = []
    for index in range(8):
        for system, shade in (("a", 160 + index), ("b", 90 + index)):
            (tmp_path / system).mkdir(exist_ok=True)
            picture = Image.new("RGB", (48, 32), (shade, shade, shade))
            picture.save(tmp_path / system / f"{index}.png")
        made.append(
            Pair(
                f"{index}",
                f"prompt {index}",
                tmp_path / "a" / f"{index}.png",
                tmp_path / "b" / f"{index}.png",
            )
        )
    return made


def brighter(body: dict[str, Any], _count: int) -> Reply:
    first, second = shades(body)
    return 200, {}, verdict("A" if first > second else "B")


def run(server: Server, pairs: list[Pair], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    cap = changes.pop("max_cost_usd", None)
    judgements = list(
        judge_pairs(
            pairs,
            ["aesthetics"],
            server.endpoint(**changes),
            cache=tmp_path / "cache.sqlite",
            max_cost_usd=cap,
        )
    )
    return summarise(judgements)["aesthetics"]


def test_a_judge_that_sees_the_difference_gives_every_pair_to_a(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    server.respond = brighter
    found = run(server, pairs, tmp_path)
    assert (found["a"], found["b"], found["tie"], found["unanswered"]) == (8, 0, 0, 0)
    assert found["win_rate_a"] == 1.0
    assert found["win_rate_interval"] == pytest.approx([0.6756, 1.0], abs=1e-4)
    assert found["strength_a_minus_b"][0] > 3.0
    assert abs(found["order_effect"][0]) < 0.01
    assert len(server.bodies) == 16
    run(server, pairs, tmp_path)
    assert len(server.bodies) == 16, "answers are cached"


def test_a_judge_that_likes_the_first_place_says_nothing_about_the_systems(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    server.respond = lambda body, n: (200, {}, verdict("A"))
    found = run(server, pairs, tmp_path)
    assert (found["tie"], found["orders_disagree"]) == (8, 8)
    assert found["strength_a_minus_b"][0] == pytest.approx(0.0, abs=1e-6)
    assert "-0.0" not in map(str, found["strength_a_minus_b"])
    assert found["order_effect"][0] > 3.0
    assert found["win_rate_interval"] == pytest.approx([0.2152, 0.7848], abs=1e-4)
    # Nothing was learnt about the systems, so nothing is certain about them.
    assert found["strength_a_minus_b"][1] < -1.0
    assert found["strength_a_minus_b"][2] > 1.0
    assert "prefers A in all 16 decided answers" in found["warnings"][0]
    assert "the two orders disagree in 8 of 8 pairs" in found["warnings"]


@pytest.mark.parametrize(
    "bad",
    [
        (429, {"Retry-After": "0"}, b"{}"),
        (503, {}, b"oops"),
        (200, {}, b"<html>no JSON"),
        (200, {}, "I prefer A."),
        (200, {}, verdict("C")),
        (200, {}, verdict("A", a_score=101)),
        (200, {}, '{"preferred": "A"}'),
    ],
)
def test_a_bad_answer_is_asked_again(
    server: Server, pairs: list[Pair], tmp_path: Path, bad: Reply
) -> None:
    # Bodies of later attempts differ in their seed.
    server.respond = lambda body, n: bad if n == 0 and body["seed"] == 0 else brighter(body, n)
    found = run(server, pairs[:2], tmp_path)
    assert (found["a"], found["unanswered"]) == (2, 0)


def test_what_never_fits_the_schema_is_unanswered_with_the_reason(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    server.respond = lambda body, n: (200, {}, verdict("maybe"))
    found = run(server, pairs[:2], tmp_path)
    assert (found["unanswered"], found["win_rate_a"]) == (2, None)
    assert "no valid answer in 3: preferred: Input should be 'A', 'B' or 'tie'" in str(
        found["problems"]
    )


def test_a_slow_server_costs_that_pair_alone(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        if "prompt 1" in json.dumps(body):
            time.sleep(0.8)
        return brighter(body, n)

    server.respond = respond
    found = run(server, pairs[:3], tmp_path, timeout_s=0.4, retries=0)
    assert (found["a"], found["unanswered"]) == (2, 1)
    assert "no answer within 0.4 s" in str(found["problems"])


def test_the_cost_cap_stops_and_a_higher_one_goes_on(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    server.respond = brighter
    with pytest.raises(JudgeStopped, match=r"might pass the cap of \$0.01; raise it to go on"):
        run(server, pairs, tmp_path, max_cost_usd=0.01)
    asked = len(server.bodies)
    assert 0 < asked < 16
    assert run(server, pairs, tmp_path, max_cost_usd=1.0)["a"] == 8
    assert len(server.bodies) == 16


def test_a_refused_key_stops_with_one_line(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    server.respond = lambda body, n: (401, {}, b"{}")
    with pytest.raises(JudgeStopped, match="HTTP 401: the API key is refused"):
        run(server, pairs, tmp_path)


def test_crops_show_the_most_detailed_places_at_their_own_pixels() -> None:
    plain = np.full((1600, 2100, 3), 90, dtype=np.uint8)
    busy = plain.copy()
    busy[1024:1536, 512:1024] = np.random.default_rng(0).integers(0, 255, (512, 512, 3))
    assert detailed_places(plain, busy)[0] == (1024, 512)
    assert detailed_places(plain, busy) == detailed_places(busy, plain)
    shown = exhibits(busy, plain)
    assert [caption for caption, _ in shown[:3]] == [
        "Image A, whole:",
        "Image A, crop 1:",
        "Image A, crop 2:",
    ]
    sizes = [Image.open(io.BytesIO(jpeg)).size for _, jpeg in shown]
    assert sizes == [(1024, 780), (512, 512), (512, 512)] * 2
    crop = np.asarray(Image.open(io.BytesIO(shown[1][1]))).astype(float)
    assert np.abs(crop - busy[1024:1536, 512:1024]).mean() < 6.0
    assert exhibits(busy, plain) == shown
    with pytest.raises(ValueError, match="at one size"):
        exhibits(busy, plain[:-1])


def test_answers_are_validated_and_questions_are_known() -> None:
    fenced = f"<think>hm</think>\n```json\n{verdict('tie')}\n```"
    assert parse_verdict(fenced).preferred == "tie"
    for text in ("", "[]", "{}", verdict("A", b_score="high"), verdict("A", a_score=None)):
        with pytest.raises(AnswerInvalid):
            parse_verdict(text)
    # A cut emoji, which JSON can hold and no file can.
    for prose in ("", "Well: "):
        cut = parse_verdict(f"{prose}{verdict('A', reasons='X')}".replace("X", "\\ud83d sharp"))
        assert cut.reasons == "? sharp"
    with pytest.raises(ValueError, match="choose of aesthetics, alignment, detail"):
        judge_prompt("beauty")


def test_the_command_writes_results_and_names_what_is_missing(
    server: Server, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.respond = brighter
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{p.name}.png", "text": p.prompt}) + "\n" for p in pairs)
    )
    arguments = ["judge", "--a", f"{tmp_path}/a", "--b", f"{tmp_path}/b", "--endpoint", server.url]
    arguments += ["--model", "some/vlm", "--requests-per-minute", "60000"]
    arguments += ["--output", f"{tmp_path}/out", "--prompts", f"{tmp_path}/metadata.jsonl"]
    results = []
    for _ in range(2):
        done = CliRunner().invoke(app, [*arguments, "--question", "detail"])
        assert done.exit_code == 0, done.output
        results.append(
            [
                (tmp_path / "out" / name).read_bytes()
                for name in ("summary.json", "judgements.jsonl")
            ]
        )
    assert results[0] == results[1]
    assert json.loads(results[0][0])["questions"]["detail"]["a"] == 8
    metadata = tmp_path / "metadata.jsonl"
    cut = metadata.read_text().replace('"text": "', r'"text": "\ud83d', 1)
    (tmp_path / "cut.jsonl").write_text(cut)
    with pytest.raises(ValueError, match="line 1: not UTF-8 at character 1 of the text"):
        judge_command.read_pairs(tmp_path / "a", tmp_path / "b", tmp_path / "cut.jsonl")
    with pytest.raises(ValueError, match="a folder, not a file"):
        judge_command.read_pairs(tmp_path / "a", tmp_path / "b", tmp_path)
    (tmp_path / "b" / "3.png").unlink()
    with pytest.raises(ValueError, match="1 pictures have no partner of the same name, such as 3"):
        judge_command.read_pairs(tmp_path / "a", tmp_path / "b", metadata)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2


GOOD = verdict("A", a_score=80, b_score=60)
MODES = {
    "chatty": f"Sure, here is my verdict:\n```json\n{GOOD}\n```\nHope that helps!",
    "extra": verdict("A", confidence=0.9),
    "lower": verdict("a"),
    "Tie": verdict("Tie", a_score=70, b_score=70),
    "strnum": verdict("A", a_score="80", b_score="60"),
    "noreason": '{"preferred":"A","a_score":80,"b_score":60}',
    "newline": '{"preferred":"A","a_score":80,"b_score":60,"reasons":"line\nbreak"}',
    "listreason": verdict("A", reasons=["x", "y"]),
    "contra": verdict("A", a_score=10, b_score=95),
}
"""Answers whose verdict is plain though their form is not as asked, and one against itself."""


def judged(server: Server, tmp_path: Path, *more: str) -> tuple[dict[str, Any], str]:
    arguments = ["judge", "--a", f"{tmp_path}/a", "--b", f"{tmp_path}/b", "--endpoint", server.url]
    arguments += ["--model", "m", "--requests-per-minute", "60000", "--question", "detail"]
    arguments += ["--output", f"{tmp_path}/out", "--prompts", f"{tmp_path}/prompts.txt", *more]
    done = CliRunner().invoke(app, arguments)
    summary = tmp_path / "out" / "summary.json"
    found = json.loads(summary.read_text())["questions"]["detail"] if summary.is_file() else {}
    return found | {"exit_code": done.exit_code}, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_verdict_in_another_form_is_read_with_one_request(
    server: Server, pairs: list[Pair], tmp_path: Path, mode: str
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(pair.prompt for pair in pairs))
    server.respond = lambda body, n: (200, {}, MODES[mode])
    found, said = judged(server, tmp_path)
    assert (found["exit_code"], found["unanswered"], len(server.bodies)) == (0, 0, 16)
    if mode == "contra":
        assert (found["contradictory"], found["repaired"]) == (16, 0)
        assert "16 of 16 answers prefer one picture and give the other the higher score" in said
    else:
        assert (found["contradictory"], found["repaired"]) == (0, 16)
        assert "16 of 16 answers were not as asked and repaired" in said
    if mode != "Tie":
        assert "goes by the place" in said


def test_a_verdict_that_can_be_read_two_ways_is_not_guessed() -> None:
    two = f"{verdict('A')} or {verdict('B')}"
    for text in (
        two,
        "I prefer A.",
        '{"preferred": "A"}',
        verdict("both"),
        verdict("A", a_score="x"),
    ):
        with pytest.raises(AnswerInvalid):
            parse_verdict(text)
    scores = '"a_score": 60, "b_score": 40, "reasons": ""}'
    for first in ('"preferred": "A"', '"Preferred": "A"', '"a_score": 1' + "0" * 5000):
        for prose in ("", "Well: "):
            with pytest.raises(AnswerInvalid, match="two values that differ"):
                parse_verdict(f'{prose}{{{first}, "preferred": "B", {scores}')
    deep = "[" * 3000 + "]" * 3000
    for text in (f'{{"preferred": "A", "extra": {deep}, {scores}', f"Sure. {deep} {{{deep}"):
        with pytest.raises(AnswerInvalid):
            parse_verdict(text)
    with pytest.raises(AnswerInvalid, match="more than 10000 opening braces"):
        parse_verdict("{" * 2**22)
    assert parse_verdict('{"preferred": "B", "preferred": "B", ' + scores).preferred == "B"
    assert parse_verdict(f"{verdict('B')} Again: {verdict('B')}").preferred == "B"
    assert parse_verdict(verdict("Image B")).preferred == "B"
    within = parse_verdict(f'{{"verdict": {verdict("B")}}}')
    assert (within.preferred, within.repairs) == ("B", ("prose around the verdict",))
    with pytest.raises(AnswerInvalid, match="2 verdicts that differ"):
        parse_verdict(f'{{"draft": {verdict("A")}, "final": {verdict("B")}}}')
    for prose in ("", "Well: "):
        with pytest.raises(AnswerInvalid, match=r"^a_score: "):
            parse_verdict(
                f'{prose}{{"preferred": "A", "a_score": NaN, "b_score": 4, "reasons": ""}}'
            )


def test_unanswered_pairs_are_no_success_and_are_asked_again(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(pair.prompt for pair in pairs))

    def respond(body: dict[str, Any], n: int) -> Reply:
        return (200, {}, "No." if "prompt 1" in json.dumps(body) else GOOD)

    server.respond = respond
    found, said = judged(server, tmp_path)
    assert (found["exit_code"], found["unanswered"], found["tie"]) == (1, 1, 7)
    assert "warning: detail: 1 of 8 pairs unanswered: no number counts them" in said
    assert "error: 1 of 8 judgements have no answer: no valid answer in 3" in said
    asked = len(server.bodies)
    server.respond = lambda body, n: (200, {}, GOOD)
    _, said = judged(server, tmp_path, "--max-cost-usd", "nan")
    assert said == "error: --max-cost-usd nan: a sum of money from 0\n"
    found, said = judged(server, tmp_path)
    assert (found["exit_code"], found["unanswered"], found["tie"]) == (0, 0, 8)
    assert len(server.bodies) == asked + 2


def test_prompts_belong_to_whole_paths_or_to_names_that_one_line_has(
    pairs: list[Pair], tmp_path: Path
) -> None:
    def read(*lines: tuple[str, str]) -> list[str]:
        file = tmp_path / "metadata.jsonl"
        rows = [json.dumps({"file_name": name, "text": text}) for name, text in lines]
        file.write_text("\n".join(rows))
        read_pairs = judge_command.read_pairs
        return [one.prompt for one in read_pairs(tmp_path / "a", tmp_path / "b", file)]

    for system in ("a", "b"):
        for number in range(2, 8):
            (tmp_path / system / f"{number}.png").unlink()
    assert read(("train/0.png", "zero"), ("train/1.png", "one")) == ["zero", "one"]
    with pytest.raises(ValueError, match=r"1 pictures have no prompt, or their name several.* 0$"):
        read(("train/0.png", "zero"), ("test/0.png", "other"), ("train/1.png", "one"))
    with pytest.raises(ValueError, match="line 2: an earlier line has another text for '0'"):
        read(("0.png", "zero"), ("0.jpg", "other"), ("1.png", "one"))
    for system in ("a", "b"):
        (tmp_path / system / "0.png").rename(tmp_path / system / "train__0.png")
    lines = (("train/0.png", "zero"), ("test/0.png", "other"), ("1.png", "one"))
    assert read(*lines) == ["one", "zero"]


def sharpness(body: dict[str, Any]) -> list[float]:
    parts = body["messages"][0]["content"]
    wholes = [
        after["image_url"]["url"].split(",")[1]
        for before, after in itertools.pairwise(parts)
        if before.get("text", "").endswith("whole:")
    ]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))), float) for one in wholes]
    return [float(np.abs(np.diff(one, axis=1)).mean()) for one in pictures]


def test_a_paid_run_begins_only_after_blurred_twins_have_lost(
    server: Server, pairs: list[Pair], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(pair.prompt for pair in pairs))
    rng = np.random.default_rng(0)
    for pair in pairs:
        for path in (pair.a, pair.b):
            Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(path)
    paid = ("--input-usd", "1", "--output-usd", "1")
    server.respond = lambda body, n: (200, {}, verdict("A"))
    refused, said = judged(server, tmp_path, *paid)
    assert refused["exit_code"] == 1
    assert "failed 3 of 3 planted pairs" in said
    assert len(server.bodies) == 6, "only the planted pairs were paid for"
    assert judged(server, tmp_path, *paid, "--no-calibrate")[0]["exit_code"] == 0

    server.bodies.clear()
    (tmp_path / "out" / "answers.sqlite").unlink()
    server.respond = lambda body, n: (200, {}, verdict("AB"[int(np.argmax(sharpness(body)))]))
    assert judged(server, tmp_path, *paid)[0]["exit_code"] == 0
    assert len(server.bodies) == 6 + 16
