"""Captions that ship with the photographs: reading, joining and checking them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.settings import CaptionSettings

STATUSES = ("ok", "missing", "too_short", "too_long", "wrong_language", "refusal")

# Beginnings of what a captioning model says instead of a caption; lower case.
_REFUSALS = (
    "i cannot",
    "i can't",
    "i can not",
    "i'm sorry",
    "i am sorry",
    "i'm unable",
    "i am unable",
    "as an ai",
    "sorry, ",
    "抱歉",
    "对不起",
    "我无法",
    "我不能",
    "作为",
)
# Share of letters in the expected script; names and signs in another script are ordinary.
_ENGLISH_LATIN_SHARE = 0.9
_CHINESE_HAN_SHARE = 0.6


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


def check_caption(caption: Caption | None, settings: CaptionSettings) -> tuple[str, int]:
    """Judge one caption.

    Order: missing (or blank English), refusal in either language, language by script (English at
    least 90% Latin letters; Chinese, where there is one, at least 60% Han), then English length.

    Returns:
        (one of `STATUSES`, number of English words).
    """
    if caption is None or not caption.english.strip():
        return "missing", 0
    words = len(caption.english.split())
    chinese = caption.chinese if caption.chinese and caption.chinese.strip() else None
    if _is_refusal(caption.english) or (chinese is not None and _is_refusal(chinese)):
        return "refusal", words
    if _script_share(caption.english, "LATIN") < _ENGLISH_LATIN_SHARE:
        return "wrong_language", words
    if chinese is not None and _script_share(chinese, "CJK") < _CHINESE_HAN_SHARE:
        return "wrong_language", words
    if words < settings.min_words:
        return "too_short", words
    if words > settings.max_words:
        return "too_long", words
    return "ok", words


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


def join_captions(
    table: pd.DataFrame,
    files: pd.Series,
    captions: dict[str, Caption],
    settings: CaptionSettings,
) -> pd.DataFrame:
    """Add captions and their status; a kept row whose caption is not "ok" is rejected.

    Its reason is "caption"; for a length problem reject_value is the number of words and
    reject_threshold the bound.

    Args:
        table: manifest rows with kept and the reject columns; unchanged.
        files: name of each row's file below the ingest source, same index.
        captions: by file.
        settings: bounds.
    """
    table = table.copy()
    found = [captions.get(file) for file in files]
    checked = [check_caption(caption, settings) for caption in found]
    table["caption_en"] = [caption.english if caption else None for caption in found]
    table["caption_zh"] = [caption.chinese if caption else None for caption in found]
    table["caption_status"] = [status for status, _ in checked]
    words = pd.Series([number for _, number in checked], index=table.index, dtype=float)
    bounds = table["caption_status"].map(
        {"too_short": float(settings.min_words), "too_long": float(settings.max_words)}
    )
    rejected = table["kept"].eq(True) & (table["caption_status"] != "ok")
    table["reject_reason"] = table["reject_reason"].astype(object).mask(rejected, "caption")
    table["reject_value"] = table["reject_value"].mask(rejected, words.where(bounds.notna()))
    table["reject_threshold"] = table["reject_threshold"].mask(rejected, bounds)
    table["kept"] = table["kept"].eq(True) & ~rejected
    return table
