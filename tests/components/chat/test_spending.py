"""What a budget charges and refuses, and which answers may stand for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.chat.client import ChatClient, EndpointUnusable, Question, RequestFailed, job_of
from components.chat.prompts import Prompt
from components.chat.request_cache import Answer, RequestCache
from components.chat.spending import Budget, CostCapReached, Prices

# Class of conftest.py.
Api = Any

# 1 USD for 1,000 tokens that are sent, 1 USD for an answer of the longest kind.
PRICES = Prices(1000.0, 10_000.0, 100)
PROMPT = Prompt("judge-1", "Describe the picture.")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RequestCache]:
    with RequestCache(tmp_path / "cache.sqlite") as opened:
        yield opened


@pytest.fixture
def client(api: Api, cache: RequestCache) -> Iterator[Callable[..., ChatClient]]:
    """`client(pause_s=0.1, retries=3)`: a client of the server, nothing in its way."""
    made = []

    def make(pause_s: float = 0.0, **changes: object) -> ChatClient:
        settings = api.settings(**changes).endpoint
        made.append(
            ChatClient(settings, PROMPT, cache, Budget(cache, ["job"], None), pause_s=pause_s)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_next_request_is_charged_as_the_longest_that_was_seen(cache: RequestCache) -> None:
    budget = Budget(cache, ["job"], 9.9)
    # 2,000 tokens are assumed before the first answer.
    first = budget.reserve("job", PRICES)
    assert cache.spent(["job"]) == pytest.approx(3.0)
    budget.settle(first, "job", PRICES, "a", Answer("long", "stop", 3000, 100))
    assert budget.spent_usd == pytest.approx(4.0)
    # 4.0 spent, 4.0 at the most: room for one, whose own answer is short.
    second = budget.reserve("job", PRICES)
    budget.settle(second, "job", PRICES, "b", Answer("short", "stop", 1000, 100))
    assert budget.spent_usd == pytest.approx(6.0)
    with pytest.raises(CostCapReached, match=r"spent \$6\.0000"):
        budget.reserve("job", PRICES)
    # Another job has not seen that question.
    assert budget.reserve("another", PRICES) > second


def test_a_request_that_is_under_way_takes_its_room(cache: RequestCache) -> None:
    budget = Budget(cache, ["job"], 6.0)
    first, second = budget.reserve("job", PRICES), budget.reserve("job", PRICES)
    assert cache.spent(["job"]) == pytest.approx(6.0)
    budget.release(first, was_billed=False)
    budget.release(second, was_billed=True)
    assert budget.spent_usd == cache.spent(["job"]) == pytest.approx(3.0)
    # What an earlier run spent on the same jobs counts.
    again = Budget(cache, ["job"], 6.0)
    assert again.spent_usd == pytest.approx(3.0)
    assert Budget(cache, ["another"], 6.0).spent_usd == 0.0


def test_pauses_double(api: Api, client: Callable[..., ChatClient]) -> None:
    api.respond = lambda body, n: api.problem(500, "broken")
    with pytest.raises(RequestFailed, match=r"broken \(4 attempts\)"):
        client(pause_s=0.1, retries=3).ask(Question("a", PROMPT, text="lake"))
    gaps = [after - before for before, after in zip(api.times, api.times[1:], strict=False)]
    # 0.1, 0.2 and 0.4 s; never less, whatever else the machine does.
    assert [gap >= pause for gap, pause in zip(gaps, (0.1, 0.2, 0.4), strict=True)] == [True] * 3


def test_a_success_between_failures_is_no_outage(
    api: Api, client: Callable[..., ChatClient]
) -> None:
    api.respond = lambda body, n: (
        api.completion("a lake") if len(api.bodies) == 10 else api.problem(400, "no")
    )
    asked = client()
    outcomes = []
    for number in range(19):
        try:
            outcomes.append(asked.ask(Question(f"{number}", PROMPT, text=f"{number}")).text)
        except RequestFailed:
            outcomes.append("")
    assert outcomes == [""] * 9 + ["a lake"] + [""] * 9
    with pytest.raises(EndpointUnusable, match="10 requests in a row failed"):
        asked.ask(Question("last", PROMPT, text="last"))


def test_a_stored_answer_is_of_the_very_question(
    api: Api, client: Callable[..., ChatClient]
) -> None:
    asked = client()
    one = Question("a", PROMPT, text="lake", picture="derivative 1024")
    for question in (
        one,
        Question("b", PROMPT, text="lake", picture="derivative 1024"),
        Question("a", PROMPT, text="hill", picture="derivative 1024"),
        Question("a", PROMPT, text="lake", picture="derivative 2048"),
        Question("a", PROMPT, text="lake", picture="derivative 1024", attempt=1),
    ):
        before = len(api.bodies)
        for _ in range(2):
            asked.ask(question)
        assert len(api.bodies) == before + 1, question


def test_whatever_may_change_an_answer_is_another_job(api: Api) -> None:
    settings = api.settings().endpoint
    jobs = [
        job_of(settings, PROMPT),
        job_of(settings, Prompt("judge-2", PROMPT.text)),
        job_of(settings, Prompt(PROMPT.version, "Describe it.")),
        job_of(settings, Prompt(PROMPT.version, PROMPT.text, system="You are strict.")),
        *(
            job_of(api.settings(**change).endpoint, PROMPT)
            for change in (
                {"model": "another"},
                {"temperature": 0.1},
                {"max_tokens": 99},
                {"seed": 8},
                {"reasoning_effort": "low"},
            )
        ),
    ]
    assert len(set(jobs)) == len(jobs)
    # Where it runs, and how fast it may be asked, change nothing.
    elsewhere = api.settings(base_url="http://127.0.0.1:9/v1", retries=0, concurrency=1)
    assert job_of(elsewhere.endpoint, PROMPT) == jobs[0]
