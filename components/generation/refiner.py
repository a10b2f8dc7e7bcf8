"""Prompt refiner: short prompts to one rich prompt each, by a language model (supplement 12).

The instruction is in our own words with the criteria of Prompt 12.1; `prompt_file` sends another
text, such as the published one. Both of its answer formats are read: a JSON list of strings, and
one line per prompt. A batch whose count is not 1:1, and single answers that fail a check, are asked
once more alone; what fails again keeps its original prompt, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.chat.client import ChatClient, Question, RequestFailed, job_of
from components.chat.prompts import Prompt, clean_answer
from components.chat.request_cache import Answer, RequestCache
from components.chat.spending import Budget
from components.corpus.captions.flaws import is_refusal
from components.settings.evaluation import RefinerSettings

SYSTEM = (
    "You are an experienced refiner of prompts for image generation. Turn every short prompt into "
    "one rich prompt of high aesthetic quality. Rules. Length: {low} to {high} words on a single "
    "line, without numbering and without quotation marks. Keep the subject and the intent; add no "
    "brands, no protected characters and no named people. Composition: say the camera angle, the "
    "shot size, the lens, what stands in the foreground, middle ground and background, and the "
    "surroundings. Subject: age range and gender expression where the prompt implies them, hair, "
    "eyes, skin or material, clothing and fabric, pose, expression or action. Light and colour: "
    "quality and direction of the key light, colour temperature, time of day, season or weather, "
    "and the palette. Medium: photographic or cinematic unless the prompt implies another; name a "
    "film look where it helps. Language: tasteful, coherent, without repetition and without piles "
    "of keywords."
)
USER = (
    "Refine the short prompts below. Write in {language}. Give exactly one refined prompt each, "
    "in their order, as a JSON list of strings and nothing else."
)
_FENCE = re.compile(r"^```[a-zA-Z]*\s*|\s*```$")
_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")
_HAN = re.compile(r"[\u3400-\u9fff]")
# Han characters per English word; the captions of the sample have 1.6 to 2.1.
_HAN_PER_WORD = 1.8


class AnswerMalformed(ValueError):
    """An answer that cannot be used; one line saying why."""


@dataclass(frozen=True)
class Refined:
    """What became of one prompt."""

    original: str
    prompt: str
    """The refined prompt, or the original."""
    reason: str = ""
    """Why it is the original; empty when it was refined."""


def word_count(text: str) -> float:
    """Words; Han characters, which stand without spaces, count 1/1.8 of a word each."""
    han = len(_HAN.findall(text))
    return len(_HAN.sub(" ", text).split()) + han / _HAN_PER_WORD


def parse_answer(text: str, count: int) -> list[str]:
    """The refined prompts of an answer.

    Args:
        text: a JSON list of strings (also in a code fence), or one prompt a line.
        count: how many were asked for.

    Raises:
        AnswerMalformed: neither format, or another number of prompts.
    """
    body = _FENCE.sub("", text.strip()).strip()
    if body.startswith("["):
        try:
            found = json.loads(body)
        except json.JSONDecodeError as problem:
            raise AnswerMalformed(f"not a JSON list: {problem.msg}") from None
        if not all(isinstance(item, str) for item in found):
            raise AnswerMalformed("the list holds something else than texts")
    else:
        # A single prompt may be wrapped over lines; several have a line each.
        lines = [_MARK.sub("", line) for line in body.splitlines() if line.strip()]
        found = [" ".join(lines)] if count == 1 else lines
    prompts = [clean_answer(item) for item in found]
    if len(prompts) != count:
        raise AnswerMalformed(f"{len(prompts)} prompts instead of {count}")
    return prompts


def check_refined(text: str, settings: RefinerSettings) -> str:
    """Why a refined prompt is of no use; empty when it is good."""
    if not text:
        return "empty"
    if is_refusal(text):
        return "refused"
    words = word_count(text)
    if not settings.min_words <= words <= settings.max_words:
        return f"{words:.0f} words, not {settings.min_words} to {settings.max_words}"
    return ""


def refiner_prompt(settings: RefinerSettings, root: Path) -> Prompt:
    """What is sent.

    Raises:
        ValueError: `prompt_file` is missing or not UTF-8.
    """
    system = SYSTEM.format(low=settings.min_words, high=settings.max_words)
    if settings.prompt_file is not None:
        try:
            system = (root / settings.prompt_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise ValueError(
                f"refiner.prompt_file: {settings.prompt_file} is not a readable UTF-8 file"
            ) from None
    return Prompt("refiner-1", USER.format(language=settings.language), system)


def refine_prompts(
    prompts: Sequence[str], settings: RefinerSettings, *, cache: Path, root: Path
) -> list[Refined]:
    """Refine prompts, in order; each distinct prompt once.

    Args:
        prompts: short prompts.
        settings: endpoint, language and bounds.
        cache: file of the request cache; made when missing.
        root: where `prompt_file` is found.

    Raises:
        EndpointUnusable: missing key, wrong address or model.
        CostCapReached: the next request might pass `max_cost_usd`.
        ValueError: bad prompt file or cache file.
    """
    prompt = refiner_prompt(settings, root)
    waiting = list(dict.fromkeys(prompts))
    results: dict[str, Refined] = {}
    with RequestCache(cache) as store:
        budget = Budget(store, [job_of(settings.endpoint, prompt)], settings.max_cost_usd)
        client = ChatClient(settings.endpoint, prompt, store, budget)
        try:
            for first in range(0, len(waiting), settings.batch_size):
                batch = waiting[first : first + settings.batch_size]
                for result in _ask(client, prompt, batch, settings, attempt=0):
                    if result.reason:
                        again = _ask(client, prompt, [result.original], settings, attempt=1)
                        results[result.original] = again[0]
                    else:
                        results[result.original] = result
        finally:
            client.close()
    return [results[text] for text in prompts]


def _ask(
    client: ChatClient,
    prompt: Prompt,
    batch: list[str],
    settings: RefinerSettings,
    *,
    attempt: int,
) -> list[Refined]:
    """One request for a batch; every problem becomes a reason."""
    text = f"Short prompts: {json.dumps(batch, ensure_ascii=False)}"
    try:
        answer = client.ask(Question("", prompt, text=text, attempt=attempt))
        refined = parse_answer(_usable(answer), len(batch))
    except (RequestFailed, AnswerMalformed) as problem:
        return [Refined(original, original, str(problem)) for original in batch]
    out = []
    for original, candidate in zip(batch, refined, strict=True):
        reason = check_refined(candidate, settings)
        out.append(Refined(original, original if reason else candidate, reason))
    return out


def _usable(answer: Answer) -> str:
    if answer.finish_reason == "refusal" or is_refusal(answer.text):
        raise AnswerMalformed("refused")
    if answer.finish_reason == "length":
        raise AnswerMalformed("cut off at refiner.endpoint.max_tokens")
    return answer.text
