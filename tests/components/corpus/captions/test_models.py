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

from components.chat.request_cache import RequestCache
from components.corpus.captions.checks import Caption, Judged, judge_provided
from components.corpus.captions.writing import CaptioningStopped

ROOT = Path(__file__).parents[4]

# Classes of conftest.py.
Api = Any
Corpus = Any
Reply = tuple[int, dict[str, str], bytes]


def test_kept_pictures_are_captioned_and_others_are_not_asked(api: Api, corpus: Corpus) -> None:
    result = corpus.write(api.settings(), kept=[True, False, *[True] * 6])
    assert corpus.statuses(result) == ["ok", None, *["ok"] * 6]
    assert result.rows[0] == Judged(
        api.english, None, "ok", "some/vlm, prompt detailed-1", None, words=6
    )
    assert sorted(api.asked) == [name for name in corpus.names if name != "picture-1"]
    body, headers = api.bodies[0], api.headers[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/vlm", 0.5, 200)
    assert body["seed"] == 7
    assert "reasoning_effort" not in body
    assert "about 90 to 110 words" in body["messages"][0]["content"][0]["text"]
    assert headers["Authorization"] == f"Bearer {api.key}"
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
        return api.completion(f"picture of exactly {number} red hills")

    api.respond = slow_first
    wanted = [f"picture of exactly {n} red hills" for n in range(8)]
    for concurrency, cache in ((1, "a"), (8, "b")):
        result = corpus.write(api.settings(concurrency=concurrency), cache=cache)
        assert [row.english for row in result.rows] == wanted


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda api: api.completion("I'm sorry, I cannot describe it"), "refusal"),
        (lambda api: api.completion(None, refusal="not allowed"), "refusal"),
        (lambda api: api.completion(None, finish="content_filter"), "refusal"),
        (lambda api: api.completion("lake"), "too_short"),
        (lambda api: api.completion(api.english + " under a wide sky"), "too_long"),
        (lambda api: api.completion("a calm lake below red hills " * 3), "repetitive"),
        (lambda api: api.completion("红色山丘 下 的湖"), "wrong_language"),
        (lambda api: api.completion(api.english, finish="length"), "truncated"),
        (lambda api: api.completion("<think>The picture shows a lake, so"), "missing"),
        (lambda api: api.completion(""), "missing"),
    ],
)
def test_a_failed_check_is_asked_once_more_with_another_seed_then_recorded(
    api: Api, corpus: Corpus, answer: Callable[[Api], Reply], status: str
) -> None:
    api.respond = lambda body, n: (
        api.completion(api.english) if api.picture_of(body) == "picture-0" and n else answer(api)
    )
    result = corpus.write(api.settings(concurrency=1), kept=[True, True, *[False] * 6])
    assert corpus.statuses(result)[:2] == ["ok", status]
    assert api.asked == ["picture-0"] * 2 + ["picture-1"] * 2
    assert [body["seed"] for body in api.bodies] == [7, 8, 7, 8]
    corpus.write(api.settings(concurrency=1), kept=[True, True, *[False] * 6])
    assert len(api.bodies) == 4


def test_thoughts_of_a_model_are_not_its_caption(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: api.completion(f"<think>A lake.\n\n</think>\n\n{api.english}")
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert result.rows[0].english == api.english


def test_without_a_seed_the_second_try_is_still_another_request(api: Api, corpus: Corpus) -> None:
    api.respond = lambda body, n: api.completion(api.english if n else "lake")
    result = corpus.write(api.settings(seed=None), kept=[True, *[False] * 7])
    assert corpus.statuses(result)[0] == "ok"
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
    assert corpus.statuses(result) == ["ok"] * 8
    assert len(api.bodies) == 8
    assert result.spent_usd == pytest.approx(0.016)


def test_an_answer_that_may_have_been_billed_counts_against_the_cap(
    api: Api, corpus: Corpus
) -> None:
    def hang(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.5)
        return api.completion(api.english)

    api.respond = hang
    result = corpus.write(api.settings(timeout_s=0.2, retries=0), kept=[True, *[False] * 7])
    assert result.problems == ["no answer within 0.2 s (1 attempts)"]
    assert result.spent_usd == pytest.approx(0.004)
    api.respond = lambda body, n: api.problem(500, "not billed")
    free = corpus.write(api.settings(retries=0), kept=[True, *[False] * 7], cache="other")
    assert free.spent_usd == 0


def test_answers_without_usage_are_charged_at_the_estimate(api: Api, corpus: Corpus) -> None:
    data = json.dumps({"choices": [{"message": {"content": api.english}}]}).encode()
    api.respond = lambda body, n: (200, {}, data)
    result = corpus.write(api.settings(), kept=[True, *[False] * 7])
    assert (corpus.statuses(result)[0], result.spent_usd) == ("ok", pytest.approx(0.004))


def test_translations_are_made_of_usable_captions(api: Api, corpus: Corpus) -> None:
    def respond(body: dict[str, Any], n: int) -> Reply:
        what = api.picture_of(body)
        if what == "picture-2":
            return api.completion("lake")
        if what.startswith("picture"):
            return api.completion(f"a calm lake below {what[-1]} hills")
        return api.completion("a lake" if "5" in what else f"{api.chinese}。")

    api.respond = respond
    result = corpus.write(api.settings(translate={"temperature": 0.1}))
    assert corpus.statuses(result) == [
        "ok",
        "ok",
        "too_short",
        "ok",
        "ok",
        "wrong_language",
        "ok",
        "ok",
    ]
    row = result.rows[0]
    assert row.chinese == f"{api.chinese}。"
    assert row.translation_model == "some/mt, prompt simplified-chinese-1"
    assert result.rows[2].translation_model is None
    # The English passed; its length is not what failed.
    assert result.rows[5].failed_english is False
    requests = len(api.bodies)
    assert corpus.write(api.settings(translate={"temperature": 0.1})) == result
    assert len(api.bodies) == requests


def came_with(english: str, chinese: str | None, chosen: Any) -> Judged:
    return judge_provided(Caption(english, chinese), chosen, "provided: x")


def test_captions_that_came_with_the_images_are_never_asked_for(api: Api, corpus: Corpus) -> None:
    """Good in both languages, English alone, too short, Chinese alone, in no language; nothing."""
    texts = [(api.english, api.chinese), (api.english, None), ("lake", None), ("", api.chinese)]
    texts += [(api.english, "a lake"), ("", None), ("", None), ("", None)]
    expected = {
        "keep": (
            ["ok", "ok", "too_short", "ok", "wrong_language", "ok", "ok", None],
            ["picture-3", "picture-5", "picture-6"],
            4,
        ),
        "replace_failed": (
            ["ok"] * 7 + [None],
            ["picture-2", "picture-3", "picture-5", "picture-6"],
            6,
        ),
    }
    for provided, (statuses, pictures, translations) in expected.items():
        api.bodies.clear()
        chosen = api.settings(translate={"temperature": 0.1}, provided=provided)
        rows = [came_with(*text, chosen) for text in texts]
        kept = [True] * 7 + [False]
        result = corpus.write(chosen, provided=rows, kept=kept, cache=provided)
        assert corpus.statuses(result) == statuses
        asked = sorted(name for name in api.asked if name.startswith("picture"))
        assert asked == pictures
        assert len(api.asked) - len(asked) == translations
        assert result.rows[0] == rows[0]
        first = result.rows[1]
        assert (first.caption_model, first.chinese) == ("provided: x", api.chinese)
        assert first.translation_model == "some/mt, prompt simplified-chinese-1"
        # A Chinese text alone is not the translation of what a model writes.
        assert result.rows[3].translation_model == "some/mt, prompt simplified-chinese-1"


def test_a_cap_needs_prices_and_without_a_cap_none_are_needed(api: Api, corpus: Corpus) -> None:
    unpriced = {"input_usd_per_million": None, "output_usd_per_million": None}
    chosen = api.settings(translate={"output_usd_per_million": None}, **unpriced)
    with pytest.raises(ValueError, match=r"max_cost_usd \(1\) needs prices: set") as caught:
        corpus.write(chosen)
    for name in ("endpoint.input", "endpoint.output", "translate.endpoint.output"):
        assert f"caption.{name}_usd_per_million" in str(caught.value)
    assert "translate.endpoint.input" not in str(caught.value)
    assert api.bodies == []
    result = corpus.write(api.settings(max_cost_usd=None, **unpriced))
    assert (corpus.statuses(result), result.spent_usd) == (["ok"] * 8, None)


def test_a_model_of_ones_own_costs_nothing_under_any_cap(api: Api, corpus: Corpus) -> None:
    free = {"input_usd_per_million": 0.0, "output_usd_per_million": 0.0}
    result = corpus.write(api.settings(max_cost_usd=0.0, **free))
    assert (corpus.statuses(result), result.spent_usd) == (["ok"] * 8, 0.0)


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
from components.corpus.captions.checks import CaptionBatch
from components.corpus.captions.models import write_captions
from components.corpus.captions.provided import NOT_PROVIDED
from components.settings.captions import CaptionSettings

folder = Path(sys.argv[1])
settings = CaptionSettings.model_validate_json((folder / "settings.json").read_text(), strict=False)
names = [f"picture-{n}" for n in range(40)]
write_captions(
    lambda: [CaptionBatch(names, [True] * 40, [NOT_PROVIDED] * 40)],
    folder / "derivatives.parquet", settings, derivative_px=1024,
    cache=folder / "cache.sqlite", root=folder,
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
        return api.completion(f"a lake below {api.picture_of(body)} hills")

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
