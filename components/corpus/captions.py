"""Captions: reading those that ship with the photographs, checking and joining all of them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.settings import CaptionSettings

STATUSES = (
    "ok",
    "missing",
    "too_short",
    "too_long",
    "wrong_language",
    "refusal",
    "truncated",
    "error",
)
"""The last two come from models: the answer hit its token limit, or there was none."""

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
# Han characters per English word; the 21 captions of the sample have 1.6 to 2.1.
_HAN_PER_WORD = (0.7, 4.0)


@dataclass(frozen=True)
class Caption:
    """One line of a captions file."""

    english: str
    chinese: str | None


def _script_share(text: str, script: str) -> float:
    """Share of the letters of `text` whose Unicode name starts with `script`; 0 without letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 0.0
    matching = sum(unicodedata.name(letter, "").startswith(script) for letter in letters)
    return matching / len(letters)


def _is_refusal(text: str) -> bool:
    return text.strip().lower().replace("’", "'").startswith(_REFUSALS)


def check_english(text: str, settings: CaptionSettings) -> tuple[str, int]:
    """Judge an English caption: missing, refusal, language (90% Latin letters), then length.

    Returns:
        (one of `STATUSES`, number of words).
    """
    words = len(text.split())
    if not words:
        return "missing", 0
    if _is_refusal(text):
        return "refusal", words
    if _script_share(text, "LATIN") < _ENGLISH_LATIN_SHARE:
        return "wrong_language", words
    if words < settings.min_words:
        return "too_short", words
    if words > settings.max_words:
        return "too_long", words
    return "ok", words


def check_chinese(text: str, english: str) -> str:
    """Judge a translation of `english`: missing, refusal, language (60% Han letters), length.

    Returns:
        one of `STATUSES`.
    """
    if not text.strip():
        return "missing"
    if _is_refusal(text):
        return "refusal"
    if _script_share(text, "CJK") < _CHINESE_HAN_SHARE:
        return "wrong_language"
    shortest, longest = (bound * len(english.split()) for bound in _HAN_PER_WORD)
    characters = sum(character.isalpha() for character in text)
    if characters < shortest:
        return "too_short"
    if characters > longest:
        return "too_long"
    return "ok"


def check_caption(caption: Caption | None, settings: CaptionSettings) -> tuple[str, int]:
    """Judge one shipped caption.

    Order: missing (or blank English), refusal in either language, language by script (English at
    least 90% Latin letters; Chinese, where there is one, at least 60% Han), then English length.
    The length of a Chinese text that a person wrote is not judged.

    Returns:
        (one of `STATUSES`, number of English words).
    """
    if caption is None:
        return "missing", 0
    status, words = check_english(caption.english, settings)
    chinese = caption.chinese if caption.chinese and caption.chinese.strip() else None
    if status in ("missing", "refusal") or chinese is None:
        return status, words
    if _is_refusal(chinese):
        return "refusal", words
    if _script_share(chinese, "CJK") < _CHINESE_HAN_SHARE:
        return "wrong_language", words
    return status, words


def _parse(line: str, where: str) -> tuple[str, Caption]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where}: not JSON: {problem.msg} at column {problem.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with file, caption_en and caption_zh")
    for key, kinds in (("file", str), ("caption_en", str), ("caption_zh", str | None)):
        if not isinstance(record.get(key), kinds):
            raise ValueError(f"{where}: {key!r} must be text, got {record.get(key)!r}")
    return record["file"], Caption(record["caption_en"], record.get("caption_zh"))


def read_captions(path: Path, known_files: Collection[str]) -> dict[str, Caption]:
    """Read a captions.jsonl.

    Args:
        path: one JSON object a line: file (below the ingest source), caption_en, caption_zh.
        known_files: files of the corpus.

    Raises:
        ValueError: missing file; or a line, by number, that is not such an object, names a file
            twice or a file that is not in the corpus.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path.name}: not found in ingest.source; add it or correct caption.file"
        ) from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path.name}: not UTF-8 at byte {problem.start}") from None
    captions: dict[str, Caption] = {}
    # Only "\n" ends a line: splitlines() would also split at separators inside a caption.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        file, caption = _parse(line, where)
        if file in captions:
            raise ValueError(f"{where}: {file!r} has a caption already")
        if file not in known_files:
            raise ValueError(f"{where}: {file!r} is not a photograph of ingest.source")
        captions[file] = caption
    return captions


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


def judge_shipped(caption: Caption | None, settings: CaptionSettings) -> Judged:
    """Check a caption that came with its photograph."""
    status, words = check_caption(caption, settings)
    if caption is None:
        return Judged(None, None, status, None, None)
    author = f"shipped: {settings.file}"
    return Judged(
        caption.english,
        caption.chinese,
        status,
        author,
        author if caption.chinese is not None else None,
        words,
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
