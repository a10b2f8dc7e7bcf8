"""What a pairwise judge is asked, and how its answer is read.

The questions are in our own words: aesthetics with the criteria and the answer format of UltraFlux
supplement 11.1, alignment and detail after the preference study of Diffusion-4K (section 4.3). A
published text can be sent instead from a file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from components.chat.prompts import Prompt, load_prompt
from components.settings.field_errors import first_error

_FORM = (
    "Answer with one JSON object and nothing else: "
    '{"preferred": "A" or "B" or "tie", "a_score": a number from 0 to 100, '
    '"b_score": a number from 0 to 100, "reasons": "one short sentence"}.'
)
_SHOWN = (
    "You see two images that were made from the same text, A and B: each as a whole, made smaller, "
    "and then as crops at its own pixels from the same places."
)
QUESTIONS = {
    "aesthetics": (
        f"{_SHOWN} Judge without favour which of them people with a good eye would prefer. Weigh "
        "composition, sharpness and clarity, light and contrast, harmony of the colours, noise and "
        "compression artifacts, and the appeal of the whole. Decide; call it a tie only where the "
        f"two are all but equal. {_FORM}"
    ),
    "alignment": (
        f"{_SHOWN} Judge which of them shows more faithfully what the text says: subjects, their "
        "number, attributes and relations, setting and style. Beauty does not count. Call it a "
        f"tie only where both follow the text equally well. {_FORM}"
    ),
    "detail": (
        f"{_SHOWN} Judge which of them renders fine detail better: clarity, sharpness, texture, "
        "edges, patterns and small differences of colour, above all in the crops. Nothing else "
        f"counts. Call it a tie only where they are all but equal. {_FORM}"
    ),
}
"""By name; an edited text gets a new version in `judge_prompt`."""
_VERSION = 1
_FENCE = re.compile(r"^```[a-zA-Z]*\s*|\s*```$")
_THOUGHTS = re.compile(r"^\s*<think>.*?(?:</think>|$)", re.DOTALL)
_PLACE = re.compile(r"(?:image|picture|option)?\s*([ab])\.?", re.IGNORECASE)
# Where each brace may begin an object, time grows with their square: a verdict has one, and a model
# that repeats itself writes millions.
_MOST_BRACES = 10_000
_SCORE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/\s*100|%)?")


class AnswerInvalid(ValueError):
    """An answer that does not fit the schema; one line saying where."""


def _whole_characters(text: object) -> object:
    # Half of a character, as JSON of a cut emoji holds it, cannot be written to a file.
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


class Verdict(BaseModel):
    """The answer, as the supplement's format has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preferred: Literal["A", "B", "tie"]
    a_score: Annotated[float, Field(ge=0.0, le=100.0)]
    b_score: Annotated[float, Field(ge=0.0, le=100.0)]
    reasons: Annotated[str, BeforeValidator(_whole_characters)]
    repairs: tuple[str, ...] = Field(default=(), exclude=True)
    """What was not as asked, though it could be read one way only."""

    @property
    def is_contradictory(self) -> bool:
        """Whether the scores say the opposite of the preference."""
        lead = self.a_score - self.b_score
        return {"A": lead < 0.0, "B": lead > 0.0, "tie": lead != 0.0}[self.preferred]


def judge_prompt(question: str, file: Path | None = None) -> Prompt:
    """The text of a question, or that of `file`.

    Raises:
        ValueError: no such question, or an unreadable file.
    """
    if question not in QUESTIONS:
        raise ValueError(f"question {question!r}: choose of {', '.join(QUESTIONS)}")
    version = f"judge-{question}-{_VERSION}"
    return load_prompt(version, file, {version: QUESTIONS[question]})


def parse_verdict(text: str) -> Verdict:
    """Read an answer; what is not as asked but can be read one way only is repaired and named.

    Thoughts and a code fence around the object are left out without a word. Repaired are: prose or
    another object around it, keys that were not asked for, other case, line breaks in a text,
    numbers as text, and missing or listed reasons. A preference or a score is never guessed.

    Raises:
        AnswerInvalid: no object, two that differ, a key with two values, no preference or score, or
            one out of range.
    """
    body = _FENCE.sub("", _THOUGHTS.sub("", text).strip()).strip()
    try:
        plain = Verdict.model_validate_json(body)
        # The model's own reader takes the last of two values.
        json.loads(body, object_pairs_hook=_distinct, parse_int=float)
        return plain
    except ValidationError as problem:
        first = problem
    try:
        fields, repairs = _found_object(body, first)
        verdict = _repaired(fields, repairs)
        return Verdict.model_validate(verdict | {"repairs": tuple(repairs)})
    except ValidationError as problem:
        raise AnswerInvalid(first_error(problem, whole="answer", verbatim=True)) from None
    except RecursionError:
        raise AnswerInvalid("answer: too deeply nested") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with keys in lower case, none of them said twice with other values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = key.strip().lower()
        known = found.setdefault(name, value)
        # NaN, which the schema refuses by its name, differs from itself.
        if known is not value and known != value:
            raise AnswerInvalid(f"{name}: two values that differ")
    return found


def _found_object(body: str, problem: ValidationError) -> tuple[dict[str, Any], list[str]]:
    """The one JSON object of a text, keys in lower case, and what had to be passed over."""
    if body.count("{") > _MOST_BRACES:
        raise AnswerInvalid(f"answer: more than {_MOST_BRACES} opening braces")
    # Not strict: line breaks within a text are no valid JSON, and can mean nothing else. Floats:
    # Python converts no whole number of very many digits.
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_distinct, parse_int=float)
    found: list[dict[str, Any]] = []
    place, prose = 0, ""
    while (start := body.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(body, start)
        except json.JSONDecodeError:
            end, value = start + 1, {}
        # One such as {"verdict": {...}} may hold it.
        end = end if "preferred" in value else start + 1
        if "preferred" in value:
            found.append(value)
            prose += body[place:start]
        else:
            prose += body[place:end]
        place = end
    if not found:
        raise AnswerInvalid(first_error(problem, whole="answer", verbatim=True))
    if any(one != found[0] for one in found):
        raise AnswerInvalid(f"answer: {len(found)} verdicts that differ")
    prose += body[place:]
    return found[0], ["prose around the verdict"] if prose.strip("`\n json") else []


def _repaired(fields: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    asked = ("preferred", "a_score", "b_score")
    known: dict[str, Any] = {name: fields[name] for name in asked if name in fields}
    if set(fields) - {*known, "reasons"}:
        repairs.append("keys that were not asked for")
    preferred = known.get("preferred")
    if isinstance(preferred, str) and preferred not in {"A", "B", "tie"}:
        text = preferred.strip()
        match = _PLACE.fullmatch(text)
        known["preferred"] = match[1].upper() if match else text.lower()
        repairs.append("preference in other words")
    for name in ("a_score", "b_score"):
        value = known.get(name)
        if isinstance(value, str) and (match := _SCORE.fullmatch(value.strip())):
            known[name] = float(match[1])
            repairs.append("score as text")
    reasons = fields.get("reasons")
    if isinstance(reasons, list):
        known["reasons"] = "; ".join(str(reason) for reason in reasons)
        repairs.append("list of reasons")
    elif reasons is None:
        known["reasons"] = ""
        repairs.append("no reasons")
    else:
        known["reasons"] = reasons
        if isinstance(reasons, str) and "\n" in reasons:
            repairs.append("line break in a text")
    return known
