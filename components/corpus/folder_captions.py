"""Captions that lie in a folder of photographs, and which of them the stage `caption` would take.

By the stage's own readers and checks; of a large folder a sample is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.corpus.captions.caption_files import CaptionLoss, Sidecars, read_captions
from components.corpus.captions.checks import (
    PROVIDED,
    Caption,
    judge_provided,
    needs_chinese,
    needs_english,
)
from components.corpus.captions.provided import NOT_PROVIDED
from components.corpus.captions.statuses import remedies
from components.corpus.source_sample import spread
from components.settings.captions import CaptionSettings

_TEXT_FILES = 2000
_JUDGED = 200
"""Captions that are kept for the checks, each of which takes a millisecond."""


@dataclass
class FolderCaptions:
    """What was found."""

    words: list[int] = field(default_factory=list)
    """Of each English caption that was looked at."""
    lines: int = 0
    """Photographs with a caption in the JSONL file."""
    files: int = 0
    """Other photographs with a text file beside them, without those of `unread`."""
    unread: list[CaptionLoss] = field(default_factory=list)
    """Captions of which the stage can make nothing, of those that were looked at."""
    problem: str | None = None
    """Why the JSONL file is of no use as a whole; one line."""
    looked_at: dict[str, Caption] = field(default_factory=dict)
    """Some of them by photograph, all where there are few."""

    def has_words(self, record: str, caption: Caption) -> bool:
        """Whether there is a text; counts it or its loss."""
        count = len(caption.english.split())
        if count:
            self.words.append(count)
        else:
            self.unread.append(CaptionLoss(record, "empty"))
        return count > 0


def captions_in(
    folder: Path, file: str, names: Sequence[str], endings: Collection[str]
) -> FolderCaptions:
    """What the stage `caption` will find; text files of a sample are read.

    Args:
        folder: the source.
        file: name of its JSONL file of captions, which need not be there.
        names: photographs below the folder.
        endings: of photographs.
    """
    found = FolderCaptions()
    captions: Mapping[str, Caption] = {}
    if (folder / file).is_file():
        try:
            captions, _ = read_captions(folder / file, names)
        except ValueError as problem:
            found.problem = str(problem)
    with_words = [name for name, caption in captions.items() if found.has_words(name, caption)]
    found.lines = len(with_words)
    sidecars = Sidecars(folder, endings)
    beside: dict[str, str] = {}
    for name in names:
        try:
            if name not in captions and (sidecar := sidecars.find(name)):
                beside[name] = sidecar
        except ValueError as problem:
            found.unread.append(CaptionLoss(name, str(problem)))
    texts: dict[str, Caption] = {}
    unread = 0
    for name in spread(list(beside), _TEXT_FILES):
        try:
            texts[name] = Caption(sidecars.read(beside[name]), None)
            unread += not found.has_words(beside[name], texts[name])
        except ValueError as problem:
            found.unread.append(CaptionLoss(beside[name], str(problem)))
            unread += 1
    found.files = len(beside) - unread
    with_words += [name for name, caption in texts.items() if caption.english]
    for name in spread(with_words, _JUDGED):
        found.looked_at[name] = texts[name] if name in texts else captions[name]
    return found


def is_taken(caption: Caption | None, settings: CaptionSettings) -> bool:
    """Whether the stage keeps a photograph that brings this (None: nothing).

    Of what a model is still to write it is taken that it passes.
    """
    if caption is None or settings.provided == "ignore":
        row = NOT_PROVIDED
    else:
        row = judge_provided(caption, settings, PROVIDED)
    if row.status == "ok":
        return True
    if needs_english(row, settings):
        return settings.provider != "shipped"
    return settings.translate.provider == "endpoint" and needs_chinese(row, settings)


def flaws(captions: Collection[Caption], settings: CaptionSettings) -> str:
    """How many of these the stage rejects and what would mend them; empty: none."""
    statuses = Counter(
        str(judge_provided(caption, settings, PROVIDED).status)
        for caption in captions
        if not is_taken(caption, settings)
    )
    if not statuses:
        return ""
    return f"{statuses.total()} of {len(captions)} that were looked at: {remedies(statuses)}"
