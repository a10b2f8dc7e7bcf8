"""Captions: what is checked, whoever wrote them, and how they join the manifest."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from components.settings.captions import CaptionSettings

STATUSES = (
    "ok",
    "missing",
    "too_short",
    "too_long",
    "wrong_language",
    "refusal",
    "repetitive",
    "truncated",
    "error",
)
"""The last two come from models: the answer hit its token limit, or there was none."""

PROVIDED = "provided: "
"""Begins the author of a caption that came with its image; what brought it follows."""

# Beginnings of what a captioning model says instead of a caption; lower case.
_REFUSALS = (
    "i cannot",
    "i can't",
    "i can not",
    "i'm sorry",
    "i am sorry",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "unfortunately, i",
    "as an ai",
    "as a language model",
    "sorry, ",
    "抱歉",
    "很抱歉",
    "非常抱歉",
    "对不起",
    "我无法",
    "我不能",
    # Not "作为" alone: "as the centre of the picture ..." is how a caption may begin.
    "作为ai",
    "作为人工智能",
    "作为一个ai",
    "作为一个人工智能",
    "作为一名ai",
)
# Share of letters in the expected script; names and signs in another script are ordinary.
_ENGLISH_LATIN_SHARE = 0.9
_CHINESE_HAN_SHARE = 0.6
# A model that loops says the same run of words (of characters in Chinese) again and again: the
# largest share of runs that occurred before. The captions of the sample have none at all.
_LOOP_WORDS, _LOOP_CHARACTERS = 5, 10
_LARGEST_REPEATED_SHARE = 0.3
# Han characters per English word; the 21 captions of the sample have 1.6 to 2.1.
_HAN_PER_WORD = (0.7, 4.0)


@dataclass(frozen=True)
class Caption:
    """What came with a photograph; blank English: none."""

    english: str
    chinese: str | None


def _script_share(text: str, script: str) -> float:
    """Share of the letters of `text` whose Unicode name starts with `script`; 0 without letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 0.0
    matching = sum(unicodedata.name(letter, "").startswith(script) for letter in letters)
    return matching / len(letters)


def is_refusal(text: str) -> bool:
    """Whether a text begins as a model's refusal does."""
    return text.strip().lower().replace("’", "'").startswith(_REFUSALS)


def _is_repetitive(units: Sequence[str], run: int) -> bool:
    """Whether more than 30% of the runs of `run` units stand earlier in the text as well."""
    runs = [tuple(units[start : start + run]) for start in range(len(units) - run + 1)]
    return len(runs) - len(set(runs)) > _LARGEST_REPEATED_SHARE * len(runs)


def check_english(text: str, settings: CaptionSettings) -> tuple[str, int]:
    """Judge an English caption: missing, refusal, language (90% Latin letters), loops, length.

    Returns:
        (one of `STATUSES`, number of words).
    """
    words = len(text.split())
    if not words:
        return "missing", 0
    if is_refusal(text):
        return "refusal", words
    if _script_share(text, "LATIN") < _ENGLISH_LATIN_SHARE:
        return "wrong_language", words
    if _is_repetitive(text.lower().split(), _LOOP_WORDS):
        return "repetitive", words
    if words < settings.min_words:
        return "too_short", words
    if words > settings.max_words:
        return "too_long", words
    return "ok", words


def check_chinese(text: str, english: str) -> str:
    """Judge a translation: missing, refusal, language (60% Han letters), loops, length.

    Returns:
        one of `STATUSES`.
    """
    if not text.strip():
        return "missing"
    if is_refusal(text):
        return "refusal"
    if _script_share(text, "CJK") < _CHINESE_HAN_SHARE:
        return "wrong_language"
    if _is_repetitive(text, _LOOP_CHARACTERS):
        return "repetitive"
    shortest, longest = (bound * len(english.split()) for bound in _HAN_PER_WORD)
    characters = sum(character.isalpha() for character in text)
    if characters < shortest:
        return "too_short"
    if characters > longest:
        return "too_long"
    return "ok"


@dataclass(frozen=True)
class Judged:
    """The captions of one row and what came of their checks."""

    english: str | None
    chinese: str | None
    status: str | None
    """One of `STATUSES`; None: nobody asked for a caption, because the row was rejected before."""
    caption_model: str | None
    translation_model: str | None
    words: int = 0
    """Of the English caption."""
    failed_english: bool = True
    """Which of the two a status other than "ok" is about."""


def judge_provided(caption: Caption, settings: CaptionSettings, origin: str) -> Judged:
    """Check a caption that came with its photograph; it is stored as it came.

    Order: blank English is "missing"; the checks of `check_english`; then refusal and language
    (60% Han letters) of the Chinese, where there is one. The length of a Chinese text that came
    along is not judged.

    Args:
        caption: text as it came.
        settings: bounds.
        origin: what the manifest names as author, "provided: ...".
    """
    status, words = check_english(caption.english, settings)
    chinese = caption.chinese if caption.chinese and caption.chinese.strip() else None
    failed_english = status != "ok"
    if status == "ok" and chinese is not None:
        if is_refusal(chinese):
            status = "refusal"
        elif _script_share(chinese, "CJK") < _CHINESE_HAN_SHARE:
            status = "wrong_language"
    return Judged(
        caption.english if caption.english.strip() else None,
        chinese,
        status,
        origin if words else None,
        origin if chinese is not None else None,
        words,
        failed_english or status == "ok",
    )


def join_captions(
    table: pd.DataFrame, captions: Sequence[Judged], settings: CaptionSettings
) -> pd.DataFrame:
    """Add captions and their status; a kept row whose caption is not "ok" is rejected.

    Its reason is "caption"; for a length problem of the English caption reject_value is the number
    of words and reject_threshold the bound.

    Args:
        table: manifest rows with kept and the reject columns; unchanged.
        captions: one per row, in order.
        settings: bounds.
    """
    table = table.copy()
    table["caption_en"] = [caption.english for caption in captions]
    table["caption_zh"] = [caption.chinese for caption in captions]
    table["caption_model"] = [caption.caption_model for caption in captions]
    table["translation_model"] = [caption.translation_model for caption in captions]
    table["caption_status"] = pd.Series(
        [caption.status for caption in captions], index=table.index, dtype=object
    )
    words = pd.Series([caption.words for caption in captions], index=table.index, dtype=float)
    about_english = pd.Series([caption.failed_english for caption in captions], index=table.index)
    bounds = (
        table["caption_status"]
        .map({"too_short": float(settings.min_words), "too_long": float(settings.max_words)})
        .astype(float)
        .where(about_english)
    )
    rejected = table["kept"].eq(True) & (table["caption_status"] != "ok")
    table["reject_reason"] = table["reject_reason"].astype(object).mask(rejected, "caption")
    table["reject_value"] = table["reject_value"].mask(rejected, words.where(bounds.notna()))
    table["reject_threshold"] = table["reject_threshold"].mask(rejected, bounds)
    table["kept"] = table["kept"].eq(True) & ~rejected
    return table
