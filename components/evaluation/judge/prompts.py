"""What a pairwise judge is asked, and the one form of answer that counts.

The questions are in our own words: aesthetics with the criteria and the answer format of UltraFlux
supplement 11.1, alignment and detail after the preference study of Diffusion-4K (section 4.3). A
published text can be sent instead from a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.chat.prompts import Prompt, load_prompt

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


class AnswerInvalid(ValueError):
    """An answer that does not fit the schema; one line saying where."""


class Verdict(BaseModel):
    """The answer, as the supplement's format has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preferred: Literal["A", "B", "tie"]
    a_score: Annotated[float, Field(ge=0.0, le=100.0)]
    b_score: Annotated[float, Field(ge=0.0, le=100.0)]
    reasons: str


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
    """Validate an answer against the schema; thoughts and a code fence around it are left out.

    Raises:
        AnswerInvalid: not JSON, unknown or missing keys, scores out of range, another preference.
    """
    body = _FENCE.sub("", _THOUGHTS.sub("", text).strip()).strip()
    try:
        return Verdict.model_validate_json(body)
    except ValidationError as problem:
        error = problem.errors()[0]
        where = ".".join(str(part) for part in error["loc"]) or "answer"
        raise AnswerInvalid(f"{where}: {error['msg']}") from None
