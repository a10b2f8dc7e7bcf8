"""How many captions are longer than the text encoders read, which cut what is too long.

Known from tokenizers alone, so that it is said where captions are made and not only after they were
embedded: what stands behind the limit is trained on by nobody. No torch on import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.models.backbone import Backbone

Limits = dict[str, tuple[Any, int]]
"""Encoder ("T5", "CLIP") -> (its tokenizer, most tokens that it reads, marks of start and end
among them)."""

_BATCH = 1024


@dataclass(frozen=True)
class TextLength:
    """Captions against the limit of one encoder."""

    limit: int
    """Tokens that it reads."""
    captions: int
    cut: int
    """Of them longer than the limit."""
    longest: int
    """Tokens of the longest."""


def text_limits(
    backbone: Backbone, tokenizers: Mapping[str, Any], max_sequence_length: int
) -> Limits:
    """What each kind of encoder of a backbone reads.

    CLIPs share one vocabulary, so that the first speaks for all.

    Args:
        backbone: names the part of T5; the part without a number is a CLIP.
        tokenizers: by the name of their folder.
        max_sequence_length: of T5; CLIP's tokenizer knows its own.
    """
    t5 = tokenizers.get(backbone.t5_part.replace("text_encoder", "tokenizer"))
    clip = tokenizers.get("tokenizer")
    limits = {}
    if t5 is not None:
        limits["T5"] = (t5, max_sequence_length)
    if clip is not None:
        limits["CLIP"] = (clip, int(clip.model_max_length))
    return limits


def load_text_limits(backbone: Backbone, folder: Path, max_sequence_length: int) -> Limits | None:
    """The limits of a folder of published encoders, of which the tokenizers are enough.

    Returns:
        None where they are not there or cannot be read: a later stage says so, with the command.
    """
    from transformers import CLIPTokenizer, T5TokenizerFast

    t5 = backbone.t5_part.replace("text_encoder", "tokenizer")
    kinds = {"tokenizer": CLIPTokenizer, t5: T5TokenizerFast}
    # Asked before loading: transformers would look for a missing one on the hub.
    if not all((folder / name / "tokenizer_config.json").is_file() for name in kinds):
        return None
    try:
        tokenizers = {
            name: kind.from_pretrained(folder / name, local_files_only=True)
            for name, kind in kinds.items()
        }
    except (OSError, ValueError):
        return None
    return text_limits(backbone, tokenizers, max_sequence_length)


def train_text_limits(
    backbone: Backbone, captions: Sequence[str], vocab_size: int, max_sequence_length: int
) -> Limits:
    """The limits of tiny encoders, whose tokenizers are trained on captions.

    An estimate: the encoders' own tokenizers see the training captions, which are not chosen yet
    where this is asked.
    """
    from components.models.tiny_tokenizers import train_clip_tokenizer, train_t5_tokenizer

    tokenizers = {
        "tokenizer": train_clip_tokenizer(captions, vocab_size),
        backbone.t5_part.replace("text_encoder", "tokenizer"): train_t5_tokenizer(
            captions, vocab_size
        ),
    }
    return text_limits(backbone, tokenizers, max_sequence_length)


def text_lengths(limits: Limits, captions: Iterable[str]) -> dict[str, TextLength]:
    """Count what each encoder would cut; captions are read a batch at a time.

    Args:
        limits: of `text_limits`.
        captions: one per image.
    """
    counts = dict.fromkeys(limits, (0, 0, 0))
    source = iter(captions)
    while batch := list(islice(source, _BATCH)):
        for name, (tokenizer, limit) in limits.items():
            # verbose: it would warn of every text that is longer than its model reads.
            ids = tokenizer(batch, truncation=False, padding=False, verbose=False).input_ids
            sizes = [len(one) for one in ids]
            total, cut, longest = counts[name]
            counts[name] = (
                total + len(sizes),
                cut + sum(size > limit for size in sizes),
                max(longest, *sizes),
            )
    return {
        name: TextLength(limits[name][1], total, cut, longest)
        for name, (total, cut, longest) in counts.items()
    }


def as_json(lengths: Mapping[str, TextLength]) -> dict[str, dict[str, int]]:
    """For a JSON file."""
    return {name: asdict(length) for name, length in lengths.items()}


def describe(lengths: Mapping[str, TextLength]) -> str:
    """One line about what is cut; empty where nothing is.

    Such as "T5 cuts 11 of 11 captions at 64 tokens (the longest has 190)".
    """
    return "; ".join(
        f"{name} cuts {one.cut} of {one.captions} captions at {one.limit} tokens (the longest has "
        f"{one.longest})"
        for name, one in lengths.items()
        if one.cut
    )
