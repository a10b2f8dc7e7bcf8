"""Pairwise preference by a vision-language model: both orders, and what they add up to.

Every pair is shown twice, with the systems' places exchanged. Only a preference that survives the
exchange is a win; disagreement is a tie. Answers are validated against a schema, asked again where
they do not fit, cached, and paid for under a cap, by the client that also writes captions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from components.chat.client import (
    ChatClient,
    EndpointUnusable,
    Question,
    RequestFailed,
    job_of,
)
from components.chat.prompts import Prompt
from components.chat.request_cache import RequestCache
from components.chat.spending import Budget, CostCapReached
from components.evaluation.judge.exhibits import EXHIBITS_VERSION, exhibits
from components.evaluation.judge.prompts import AnswerInvalid, Verdict, judge_prompt, parse_verdict
from components.evaluation.statistics.bradley_terry import Judged, fit_bradley_terry
from components.images.arrays import ImageArray
from components.images.decoding import ImageUndecodable, read_rgb
from components.settings.captions import EndpointSettings
from components.statistics.shares import wilson_interval
from components.telemetry.progress import track

_ATTEMPTS = 3
"""Answers that do not fit the schema are asked again with another seed."""
_ONE_PLACE = 6
"""Answers for one place in a row that chance gives in 1 of 32 runs; fewer say nothing."""
_SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}
_MAX_MEGAPIXELS = 400.0


class JudgeStopped(RuntimeError):
    """Nothing more can be asked; one line. Answers so far are in the cache."""


@dataclass(frozen=True)
class Pair:
    """Two systems' pictures of one prompt."""

    name: str
    """Unique, such as the file's name."""
    prompt: str
    a: Path
    b: Path


@dataclass(frozen=True)
class Judgement:
    """One question about one pair, asked in both orders."""

    question: str
    pair: Pair
    a_first: Verdict | None
    """None: no valid answer."""
    b_first: Verdict | None
    problem: str = ""

    @property
    def outcome(self) -> str:
        """One of "a", "b", "tie" (also where the orders disagree) and "unanswered"."""
        if self.a_first is None or self.b_first is None:
            return "unanswered"
        there, back = _SCORES[self.a_first.preferred], 1.0 - _SCORES[self.b_first.preferred]
        if there == back and there != 0.5:
            return "a" if there == 1.0 else "b"
        return "tie"


def _ask(client: ChatClient, question: Question) -> Verdict:
    """A valid verdict.

    Raises:
        RequestFailed: no answer, or none that fits the schema.
    """
    failure = ""
    fresh = 0
    for attempt in itertools.count():
        if fresh == _ATTEMPTS:
            break
        asked = replace(question, attempt=attempt)
        # An earlier run's answers without a verdict are no attempts of this one.
        fresh += not client.knows(asked)
        answer = client.ask(asked)
        if answer.finish_reason in {"refusal", "length"}:
            failure = f"answer ended with {answer.finish_reason}"
            continue
        try:
            return parse_verdict(answer.text)
        except AnswerInvalid as problem:
            failure = str(problem)
    raise RequestFailed(f"no valid answer in {_ATTEMPTS}: {failure}")


def _pixels(path: Path) -> ImageArray:
    try:
        return read_rgb(path, max_megapixels=_MAX_MEGAPIXELS).pixels
    except ImageUndecodable as problem:
        raise ValueError(f"{path}: {problem}") from None


def _judge(client: ChatClient, prompt: Prompt, name: str, pair: Pair) -> Judgement:
    pixels = [_pixels(pair.a), _pixels(pair.b)]
    if pixels[0].shape != pixels[1].shape:
        raise ValueError(f"{pair.name}: the pictures differ in size; judge pictures of one size")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (pair.a, pair.b)]
    verdicts: list[Verdict | None] = []
    problems: list[str] = []
    for first, second in ((0, 1), (1, 0)):
        question = Question(
            f"{digests[first]}:{digests[second]}",
            prompt,
            text=f"The text: {pair.prompt}",
            picture=EXHIBITS_VERSION,
            exhibits=exhibits(pixels[first], pixels[second]),
        )
        try:
            verdicts.append(_ask(client, question))
        except RequestFailed as problem:
            verdicts.append(None)
            problems.append(str(problem))
    return Judgement(name, pair, verdicts[0], verdicts[1], "; ".join(problems))


def judge_pairs(
    pairs: Sequence[Pair],
    questions: Iterable[str],
    endpoint: EndpointSettings,
    *,
    cache: Path,
    max_cost_usd: float | None,
    prompt_file: Path | None = None,
) -> Iterator[Judgement]:
    """Judge every pair by every question, in order.

    Args:
        pairs: pictures of one size each.
        questions: of `components.evaluation.judge.prompts.QUESTIONS`.
        endpoint: model, limits and prices.
        cache: file of the request cache; made when missing.
        max_cost_usd: over all runs of the same questions; None: no cap.
        prompt_file: exact text to send in place of the built-in question.

    Raises:
        JudgeStopped: the endpoint refuses everything, or the cost cap is reached.
        ValueError: an unknown question, sizes that differ, an unreadable picture.
    """
    prompts = {name: judge_prompt(name, prompt_file) for name in questions}
    with RequestCache(cache) as store:
        jobs = [job_of(endpoint, prompt) for prompt in prompts.values()]
        budget = Budget(store, jobs, max_cost_usd)
        for name, prompt in prompts.items():
            client = ChatClient(endpoint, prompt, store, budget)
            pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge")
            try:
                waiting = [pool.submit(_judge, client, prompt, name, pair) for pair in pairs]
                for future in track(waiting, f"judge {name}", total=len(waiting)):
                    yield future.result()
            except EndpointUnusable as problem:
                raise JudgeStopped(f"{problem}; run it again to go on") from None
            except CostCapReached:
                raise JudgeStopped(
                    f"spent ${budget.spent_usd:.4f}, and another request might pass the cap of "
                    f"${budget.cap_usd:g}; raise it to go on"
                ) from None
            finally:
                client.stop.set()
                pool.shutdown(cancel_futures=True)
                client.close()


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Counts, win rate and Bradley-Terry strengths of each question, JSON-ready.

    The win rate counts a tie as half and weighs prompts alike; it (Wilson) and all intervals take
    prompts as units. Fewer than 2 answered prompts give no strengths.
    """
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(one.question for one in judgements):
        asked = [one for one in judgements if one.question == name]
        answered = [one for one in asked if one.outcome != "unanswered"]
        outcomes = [one.outcome for one in asked]
        part: dict[str, Any] = {key: outcomes.count(key) for key in ("a", "b", "tie", "unanswered")}
        part["orders_disagree"] = sum(
            one.outcome == "tie" and not _both_tie(one) for one in answered
        )
        part |= _reading(answered)
        part["problems"] = sorted({one.problem for one in asked if one.problem})
        points = [{"a": 1.0, "b": 0.0, "tie": 0.5}[one.outcome] for one in answered]
        prompts = [one.pair.prompt for one in answered]
        if points:
            # Prompts are the units: several pictures of one say little more than one.
            by_prompt: dict[str, list[float]] = {}
            for prompt, point in zip(prompts, points, strict=True):
                by_prompt.setdefault(prompt, []).append(point)
            rate = float(np.mean([np.mean(of_one) for of_one in by_prompt.values()]))
            part["win_rate_a"] = rate
            part["win_rate_interval"] = list(wilson_interval(rate, len(by_prompt)))
        else:
            part["win_rate_a"] = None
        if len(set(prompts)) >= 2:
            fitted = fit_bradley_terry([row for one in answered for row in _rows(one)])
            # The parametrisation puts a at 0: what is reported is a's lead over b. Subtracted, not
            # negated: a lead of none is 0, not -0.
            lead = fitted.strengths["b"]
            part["strength_a_minus_b"] = [0.0 - x for x in (lead.value, lead.high, lead.low)]
            part["order_effect"] = [fitted.order.value, fitted.order.low, fitted.order.high]
        part["warnings"] = _warnings(part, len(answered))
        summary[name] = part
    return summary


def _answers(answered: Sequence[Judgement]) -> list[Verdict]:
    return [v for one in answered for v in (one.a_first, one.b_first) if v is not None]


def _reading(answered: Sequence[Judgement]) -> dict[str, Any]:
    """How the answers had to be read, and which place they preferred."""
    answers = _answers(answered)
    repairs = Counter(repair for verdict in answers for repair in set(verdict.repairs))
    decided = [verdict.preferred for verdict in answers if verdict.preferred != "tie"]
    part: dict[str, Any] = {
        "answers": len(answers),
        "repaired": sum(bool(verdict.repairs) for verdict in answers),
        "repairs": dict(sorted(repairs.items())),
        "contradictory": sum(verdict.is_contradictory for verdict in answers),
        "decided": len(decided),
    }
    if decided:
        share = decided.count("A") / len(decided)
        prompts = len({one.pair.prompt for one in answered})
        part["first_place_share"] = share
        # Prompts are the units; both answers about one are about the same pictures.
        part["first_place_interval"] = list(wilson_interval(share, prompts))
    return part


def _warnings(part: dict[str, Any], pairs: int) -> list[str]:
    """What forbids reading the numbers as the judge's taste; `pairs`: that were answered."""
    lines = []
    if part["unanswered"]:
        total = pairs + part["unanswered"]
        lines.append(f"{part['unanswered']} of {total} pairs unanswered: no number counts them")
    if part["contradictory"]:
        lines.append(
            f"{part['contradictory']} of {part['answers']} answers prefer one picture and give "
            "the other the higher score"
        )
    share = part.get("first_place_share")
    if share in (0.0, 1.0) and part["decided"] >= _ONE_PLACE:
        lines.append(
            f"the judge prefers {'A' if share else 'B'} in all {part['decided']} decided answers, "
            "whichever system stands there: it goes by the place and says nothing of the systems"
        )
    elif share is not None:
        low, high = part["first_place_interval"]
        if not low <= 0.5 <= high:
            lines.append(
                f"order bias: the first place is preferred in {share:.0%} of decided answers "
                f"[{low:.0%}, {high:.0%}]"
            )
    if pairs and part["orders_disagree"] > pairs / 2:
        lines.append(f"the two orders disagree in {part['orders_disagree']} of {pairs} pairs")
    return lines


def _both_tie(one: Judgement) -> bool:
    return all(
        verdict is not None and verdict.preferred == "tie" for verdict in (one.a_first, one.b_first)
    )


def _rows(one: Judgement) -> list[Judged]:
    """Both orders of an answered judgement."""
    assert one.a_first is not None
    assert one.b_first is not None
    return [
        Judged("a", "b", _SCORES[one.a_first.preferred], one.pair.prompt),
        Judged("b", "a", _SCORES[one.b_first.preferred], one.pair.prompt),
    ]
