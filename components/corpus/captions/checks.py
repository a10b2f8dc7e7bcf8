"""Captions: what is checked, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from components.corpus.captions.flaws import (
    LOOP_CHARACTERS,
    LOOP_WORDS,
    has_markup,
    is_cut_chinese,
    is_cut_english,
    is_refusal,
    is_repetitive,
    is_unreadable,
)
from components.corpus.captions.languages import (
    CHINESE,
    ENGLISH,
    is_surely_not,
    is_traditional,
    script_share,
)
from components.settings.captions import CaptionSettings

PROVIDED = "provided: "
"""Begins the author of a caption that came with its image; what brought it follows."""

# Share of letters in the expected script; names and signs in another script are ordinary.
_ENGLISH_LATIN_SHARE = 0.9
_CHINESE_HAN_SHARE = 0.6
# Han characters per English word; the 21 captions of the sample have 1.6 to 2.1.
_HAN_PER_WORD = (0.7, 4.0)


@dataclass(frozen=True)
class Caption:
    """What came with a photograph; blank English: none."""

    english: str
    chinese: str | None


def check_english(text: str, settings: CaptionSettings) -> tuple[str, int]:
    """Judge an English caption; what says most about it is asked first.

    Order: missing, unreadable, refusal, markup, script (90% Latin letters), loops, language, cut
    sentence, length.

    Returns:
        (a name of `STATUSES`, number of words).
    """
    words = len(text.split())
    if (flaw := _flaw(text)) is not None:
        return flaw, words
    # Before the identifier, which is the slowest by far and finds a language in any loop.
    if script_share(text, "LATIN") < _ENGLISH_LATIN_SHARE:
        return "wrong_language", words
    if is_repetitive(text.lower().split(), LOOP_WORDS):
        return "repetitive", words
    if is_surely_not(text, ENGLISH):
        return "wrong_language", words
    if is_cut_english(text):
        return "truncated", words
    if words < settings.min_words:
        return "too_short", words
    if words > settings.max_words:
        return "too_long", words
    return "ok", words


def check_chinese(text: str, english: str) -> str:
    """Judge a translation: as `check_provided_chinese`, then its length against the English.

    Returns:
        a name of `STATUSES`.
    """
    status = check_provided_chinese(text)
    if status != "ok":
        return status
    # Against the English and not against the settings' bounds, which count English words.
    shortest, longest = (bound * len(english.split()) for bound in _HAN_PER_WORD)
    characters = sum(character.isalpha() for character in text)
    if characters < shortest:
        return "too_short"
    if characters > longest:
        return "too_long"
    return "ok"


def check_provided_chinese(text: str) -> str:
    """Judge a Chinese text that came along, whose length nobody chose.

    Order: missing, unreadable, refusal, markup, script (60% Han letters), loops, simplified
    characters, language, cut sentence.

    Returns:
        a name of `STATUSES`.
    """
    if (flaw := _flaw(text)) is not None:
        return flaw
    if script_share(text, "CJK") < _CHINESE_HAN_SHARE:
        return "wrong_language"
    if is_repetitive(text, LOOP_CHARACTERS):
        return "repetitive"
    if is_traditional(text) or is_surely_not(text, CHINESE):
        return "wrong_language"
    return "truncated" if is_cut_chinese(text) else "ok"


def _flaw(text: str) -> str | None:
    """What is wrong with a text in any language."""
    if not text.strip():
        return "missing"
    if is_unreadable(text):
        return "unreadable"
    if is_refusal(text):
        return "refusal"
    return "markup" if has_markup(text) else None


@dataclass(frozen=True)
class Judged:
    """The captions of one row and what came of their checks."""

    english: str | None
    chinese: str | None
    status: str | None
    """A name of `STATUSES`; None: nobody asked, because the row was rejected before."""
    caption_model: str | None
    translation_model: str | None
    words: int = 0
    """Of the English caption."""
    failed_english: bool = True
    """Which of the two a status other than "ok" is about."""


@dataclass(frozen=True)
class Written:
    """A model's text for one image."""

    text: str | None
    status: str
    """A name of `STATUSES`."""
    detail: str | None = None
    """Why there is no answer (status "error")."""

    def as_caption(self, author: str) -> Judged:
        """The row of an English caption that `author` wrote."""
        words = len(self.text.split()) if self.text else 0
        return Judged(self.text, None, self.status, author if self.text else None, None, words)


WITHOUT_PICTURE = Written(None, "missing")
"""Of an image that has no derivative to look at."""


@dataclass(frozen=True)
class CaptionBatch:
    """Some rows of a manifest and their captions so far."""

    image_ids: list[str]
    kept: list[bool]
    """What the stage `select` says; the image_id of kept rows are distinct in a manifest."""
    rows: list[Judged]


Fill = Callable[[CaptionBatch], list[Judged]]
"""The rows of a batch with what one model wrote."""


@dataclass(frozen=True)
class Captioned:
    """What the models wrote."""

    fills: list[Fill]
    """One per model, in the order in which they were asked."""
    spent_usd: float | None
    """By these settings, over all runs; None where a price is not known."""
    problems: list[str]
    """Why single requests failed, in the order of the rows."""


def filled(batch: CaptionBatch, fills: Iterable[Fill]) -> CaptionBatch:
    """A batch with what the models wrote."""
    for fill in fills:
        batch = replace(batch, rows=fill(batch))
    return batch


def needs_english(row: Judged, settings: CaptionSettings) -> bool:
    """Whether nothing usable came with the image, as far as `provided` lets another replace it."""
    if row.english is None:
        return True
    return settings.provided == "replace_failed" and row.status != "ok" and row.failed_english


def needs_chinese(row: Judged, settings: CaptionSettings) -> bool:
    """Whether there is a usable English caption and no translation of it that stays."""
    if row.status == "ok":
        return row.chinese is None
    return settings.provided == "replace_failed" and not row.failed_english


def in_need(
    batches: Iterable[CaptionBatch],
    isin_need: Callable[[Judged, CaptionSettings], bool],
    settings: CaptionSettings,
) -> Iterator[tuple[str, Judged]]:
    """image_id and captions of the kept rows that a model is asked about."""
    for batch in batches:
        for image_id, was_kept, row in zip(batch.image_ids, batch.kept, batch.rows, strict=True):
            if was_kept and isin_need(row, settings):
                yield image_id, row


def fill_english(
    written: Mapping[str, Written] | Written,
    author: str,
    settings: CaptionSettings,
    *,
    unasked: Judged | None = None,
) -> Fill:
    """What `author` wrote of the kept rows without a usable English caption.

    Args:
        written: by image_id, what is not in it has no picture; or one for all.
        author: what the manifest names.
        settings: `provided`.
        unasked: what becomes of a rejected row to which nothing came; None: as it is.
    """

    def fill(batch: CaptionBatch) -> list[Judged]:
        rows = []
        for image_id, was_kept, row in zip(batch.image_ids, batch.kept, batch.rows, strict=True):
            if was_kept and needs_english(row, settings):
                if isinstance(written, Written):
                    row = written.as_caption(author)
                else:
                    row = written.get(image_id, WITHOUT_PICTURE).as_caption(author)
            elif unasked is not None and not was_kept and row.status == "missing":
                row = unasked
            rows.append(row)
        return rows

    return fill


def judge_provided(caption: Caption, settings: CaptionSettings, origin: str) -> Judged:
    """Check a caption that came with its photograph; it is stored as it came.

    Order: the checks of `check_english`; then those of `check_provided_chinese`, where there is a
    Chinese text.

    Args:
        caption: text as it came.
        settings: bounds.
        origin: what the manifest names as author, "provided: ...".
    """
    status, words = check_english(caption.english, settings)
    chinese = caption.chinese if caption.chinese and caption.chinese.strip() else None
    failed_english = status != "ok"
    if status == "ok" and chinese is not None:
        status = check_provided_chinese(chinese)
    return Judged(
        caption.english if caption.english.strip() else None,
        chinese,
        status,
        origin if words else None,
        origin if chinese is not None else None,
        words,
        failed_english or status == "ok",
    )
