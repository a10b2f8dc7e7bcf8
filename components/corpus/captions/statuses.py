"""The one list of what can be said of a caption, and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """What a value of `caption_status` means."""

    meaning: str
    remedy: str
    """What a person may change where most captions have it; empty for those that need nothing."""


_ASK_AGAIN = "caption it anew (caption.provided: replace_failed with a provider that writes)"

STATUSES: Mapping[str, Status] = {
    "ok": Status("passes every check", ""),
    "missing": Status(
        "there is none",
        "add it to caption.file or to a text file beside the photograph, or let a model write it "
        "(caption.provider)",
    ),
    "unreadable": Status(
        "characters that no decoder could read (U+FFFD, half of a surrogate pair)",
        "save the captions as UTF-8 again",
    ),
    "refusal": Status(
        "a model says that it cannot, or that it sees no picture", f"correct it, or {_ASK_AGAIN}"
    ),
    "markup": Status(
        "HTML, Markdown, JSON, an address or tokens of a chat template stand in the text",
        "strip the markup and keep the sentences",
    ),
    "repetitive": Status(
        "more than 30% of its runs of 5 words (10 characters in Chinese) stand earlier in it too",
        "remove what is repeated; another length of the same words changes nothing",
    ),
    "wrong_language": Status(
        "not English, or a Chinese text that is not simplified Chinese",
        "translate it: caption_en is English, caption_zh simplified Chinese",
    ),
    "truncated": Status(
        "it ends in the middle of a sentence, or the model ran into its limit of tokens",
        "complete the last sentence, or raise the limit of tokens of the model that wrote it",
    ),
    "too_short": Status("fewer words than caption.min_words", "write more, or lower min_words"),
    "too_long": Status("more words than caption.max_words", "write less, or raise max_words"),
    "error": Status("the model gave no answer", "look at the first error, then run it again"),
}
"""Value of the manifest's `caption_status` -> what it means; docs/corpus.md lists them."""


def remedies(counts: Mapping[str, int]) -> str:
    """What to change about captions that failed, the commonest status first.

    Args:
        counts: captions by status; those that are ok do not matter.
    """
    failed = sorted(
        (name for name, number in counts.items() if number and name != "ok"),
        key=lambda name: (-counts[name], name),
    )
    return "; ".join(f"{name} ({counts[name]}): {STATUSES[name].remedy}" for name in failed)
