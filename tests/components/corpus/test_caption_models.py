from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.corpus.caption_models import Captioned
from components.corpus.captioning import CaptioningStopped
from components.corpus.captions import Caption, Judged, judge_shipped
from components.corpus.request_cache import RequestCache

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


def test_kept_pictures_are_captioned_and_others_are_not_asked(api: Api, corpus: Corpus) -> None:
    result = corpus.write(api.settings(), kept=[True, False, *[True] * 6])
    assert statuses(result) == ["ok", None, *["ok"] * 6]
    assert result.rows[0] == Judged(
        ENGLISH, None, "ok", "some/vlm, prompt detailed-1", None, words=6
    )
    assert sorted(api.asked) == [name for name in corpus.names if name != "picture-1"]
    body, headers = api.bodies[0], api.headers[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/vlm", 0.5, 200)
    assert body["seed"] == 7
    assert "reasoning_effort" not in body
    assert "about 90 to 110 words" in body["messages"][0]["content"][0]["text"]
    assert headers["Authorization"] == f"Bearer {KEY}"
    # 1,000 tokens at $1 and 100 at $10 a million.
    assert result.spent_usd == pytest.approx(7 * 0.002)


def test_a_second_run_makes_no_request(api: Api, corpus: Corpus) -> None:
    first = corpus.write(api.settings())
    assert len(api.bodies) == 8
    second = corpus.write(api.settings(concurrency=1, retries=0, requests_per_minute=1.0))
    assert len(api.bodies) == 8
    assert second == first


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_version": "mine-1", "prompt_file": "conf/prompts/mine.txt"},
        {"model": "other/vlm"},
        {"temperature": 0.6},
        {"max_tokens": 201},
        {"seed": 8},
        {"reasoning_effort": "low"},
    ],
)
def test_what_changes_the_question_asks_again(
    api: Api, corpus: Corpus, changes: dict[str, object]
) -> None:
    (corpus.folder / "conf" / "prompts").mkdir(parents=True)
    (corpus.folder / "conf" / "prompts" / "mine.txt").write_text("What is this?\n")
    corpus.write(api.settings())
    result = corpus.write(api.settings(**changes))
    assert len(api.bodies) == 16
    if "prompt_file" in changes:
        assert api.bodies[-1]["messages"][0]["content"][0]["text"] == "What is this?"
        assert result.rows[0].caption_model == "some/vlm, prompt mine-1"


def test_order_does_not_depend_on_who_answers_first(api: Api, corpus: Corpus) -> None:
    def slow_first(body: dict[str, Any], n: int) -> Reply:
        number = int(api.picture_of(body)[-1])
        time.sleep(0.01 * (8 - number))
        return completion(f"picture of exactly {number} red hills")

    api.respond = slow_first
    wanted = [f"picture of exactly {n} red hills" for n in range(8)]
    for concurrency, cache in ((1, "a"), (8, "b")):
        result = corpus.write(api.settings(concurrency=concurrency), cache=cache)
        assert [row.english for row in result.rows] == wanted


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (completion("I'm sorry, I cannot describe it"), "refusal"),
        (completion(None, refusal="not allowed"), "refusal"),
        (completion(None, finish="content_filter"), "refusal"),
        (completion("lake"), "too_short"),
        (completion(ENGLISH + " under a wide sky"), "too_long"),
        (completion("红色山丘 下 的湖"), "wrong_language"),
        (completion(ENGLISH, finish="length"), "truncated"),
        (completion(""), "missing"),
    ],
)
def test_a_failed_check_is_asked_once_more_with_another_seed_then_recorded(
    api: Api, corpus: Corpus, answer: Reply, status: str
) -> None:
    api.respond = lambda body, n: (
        completion(ENGLISH) if api.picture_of(body) == "picture-0" and n else answer
    )
    result = corpus.write(api.settings(concurrency=1), kept=[True, True, *[False] * 6])
    assert statuses(result)[:2] == ["ok", status]
    assert api.asked == ["picture-0"] * 2 + ["picture-1"] * 2
    assert [body["seed"] for body in api.bodies] == [7, 8, 7, 8]
    corpus.write(api.settings(concurrency=1), kept=[True, True, *[False] * 6])
    assert len(api.bodies) == 4


def test_without_a_seed_the_second_try_is_still_another_request(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: completion(ENGLISH if n else "lake")
    result = corpus.write(api.settings(seed=None), kept=[True, *[False] * 7])
    assert statuses(result)[0] == "ok"
    assert len(api.bodies) == 2
    assert all("seed" not in body for body in api.bodies)


def test_the_cost_cap_stops_in_time_and_keeps_what_was_paid(api: Api, corpus: Corpus) -> None:
    # The most a first request may cost: 2,000 assumed and 200 allowed tokens; then 1,000 and 200.
    with pytest.raises(CaptioningStopped) as caught:
        corpus.write(api.settings(max_cost_usd=0.0075))
    message = str(caught.value)
    assert re.match(r"spent \$0\.0060, .*max_cost_usd \(\$0\.0075\)", message)
    assert "5 of 8 images are left to caption" in message
    assert "\n" not in message
    assert len(api.bodies) == 3
    with pytest.raises(CaptioningStopped, match="5 of 8"):
        corpus.write(api.settings(max_cost_usd=0.0075))
    assert len(api.bodies) == 3
    result = corpus.write(api.settings(max_cost_usd=0.1))
    assert statuses(result) == ["ok"] * 8
    assert len(api.bodies) == 8
    assert result.spent_usd == pytest.approx(0.016)


def test_an_answer_that_may_have_been_billed_counts_against_the_cap(
    api: Api, corpus: Corpus
) -> None:
    def hang(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.5)
        return completion(ENGLISH)

    api.respond = hang
    result = corpus.write(api.settings(timeout_s=0.2, retries=0), kept=[True, *[False] * 7])
    assert result.problems == ["no answer within 0.2 s (1 attempts)"]
    assert result.spent_usd == pytest.approx(0.004)
    api.respond = lambda body, n: problem(500, "not billed")
    free = corpus.write(api.settings(retries=0), kept=[True, *[False] * 7], cache="other")
    assert free.spent_usd == 0


def test_answers_without_usage_are_charged_at_the_estimate(api: Api, corpus: Corpus) -> None:
    data = json.dumps({"choices": [{"message": {"content": ENGLISH}}]}).encode()
    api.respond = lambda body, n: (200, {}, data)
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert (statuses(result)[0], result.spent_usd) == ("ok", pytest.approx(0.004))


def test_translations_are_made_of_usable_captions(api: Api, corpus: Corpus) -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        what = api.picture_of(body)
        if what == "picture-2":
            return completion("lake")
        if what.startswith("picture"):
            return completion(f"a calm lake below {what[-1]} hills")
        return completion("a lake" if "5" in what else f"{CHINESE}。")

    api.respond = respond
    result = corpus.write(api.settings(translate={"temperature": 0.1}))
    assert statuses(result) == ["ok", "ok", "too_short", "ok", "ok", "wrong_language", "ok", "ok"]
    row = result.rows[0]
    assert row.chinese == f"{CHINESE}。"
    assert row.translation_model == "some/mt, prompt simplified-chinese-1"
    assert result.rows[2].translation_model is None
    # The English passed; its length is not what failed.
    assert result.rows[5].failed_english is False
    requests = len(api.bodies)
    assert corpus.write(api.settings(translate={"temperature": 0.1})) == result
    assert len(api.bodies) == requests


def test_shipped_captions_can_be_translated(api: Api, corpus: Corpus) -> None:
    chosen = api.settings(translate={"seed": None}, provider="shipped")
    shipped = [judge_shipped(Caption(ENGLISH, None), chosen) for _ in corpus.names]
    result = corpus.write(chosen, shipped=shipped, kept=[True, True, *[False] * 6])
    assert [row.chinese for row in result.rows] == [CHINESE] * 2 + [None] * 6
    assert result.rows[0].caption_model == "shipped: captions.jsonl"


def test_one_cap_holds_for_captions_and_translations(api: Api, corpus: Corpus) -> None:
    chosen = api.settings(translate={"temperature": 0.1}, max_cost_usd=0.02)
    with pytest.raises(CaptioningStopped, match="of 8 images are left to translate"):
        corpus.write(chosen)
    with RequestCache(corpus.folder / "cache.sqlite") as cache:
        rows = cache._connection.execute("SELECT TOTAL(usd) FROM charges").fetchone()
    assert rows[0] <= 0.02


KILLED_RUN = """
import json, sys
from pathlib import Path
import pandas as pd
from components.corpus.caption_models import write_captions
from components.corpus.settings import CaptionSettings

folder = Path(sys.argv[1])
settings = CaptionSettings.model_validate_json((folder / "settings.json").read_text(), strict=False)
names = [f"picture-{n}" for n in range(40)]
write_captions(
    pd.DataFrame({"image_id": names, "kept": True}), None, folder / "derivatives.parquet",
    settings, derivative_px=1024, cache=folder / "cache.sqlite", root=folder,
)
"""


def test_a_killed_run_goes_on_without_asking_twice(
    tmp_path: Path, make_corpus: Callable[[int], Corpus], api: Api
) -> None:
    corpus = make_corpus(40)
    chosen = api.settings(concurrency=2)
    (tmp_path / "settings.json").write_text(chosen.model_dump_json())

    def steady(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.03)
        return completion(f"a lake below {api.picture_of(body)} hills")

    api.respond = steady
    for target in (7, 20):
        child = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(tmp_path)], cwd=ROOT)
        deadline = time.monotonic() + 30
        while len(api.bodies) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    time.sleep(0.1)
    with RequestCache(tmp_path / "cache.sqlite") as cache:
        stored = cache._connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        before = cache.spent([cache._connection.execute("SELECT job FROM charges").fetchone()[0]])
    assert stored >= 20 - 4
    asked_before = len(api.bodies)
    result = corpus.write(chosen)
    # Stored answers are not asked for again; at most what was under way at each kill is.
    assert len(api.bodies) - asked_before == 40 - stored
    assert asked_before - stored <= 2 * 2
    assert [row.english for row in result.rows] == [
        f"a lake below {name} hills" for name in corpus.names
    ]
    # Requests that were under way at a kill may have been billed and stay charged.
    assert result.spent_usd == pytest.approx(before + (40 - stored) * 0.002)
    assert result.spent_usd >= len(api.bodies) * 0.002 - 1e-9


def test_a_file_that_is_no_cache_is_one_line(api: Api, corpus: Corpus) -> None:
    (corpus.folder / "cache.sqlite").write_bytes(b"photographs, not a database" * 50)
    with pytest.raises(ValueError, match=r"cache\.sqlite: not a usable request cache"):
        corpus.write(api.settings())
