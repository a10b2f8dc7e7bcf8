"""A folder of photographs before anything is set: what is in it, and which rules would reject it.

Headers of a sample are read, a few pictures are measured, captions are counted: seconds, whatever
the folder holds.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.captions.caption_files import CaptionLoss
from components.corpus.captions.local import COMMAND, check_folder
from components.corpus.folder_captions import FolderCaptions, captions_in, flaws, is_taken
from components.corpus.listing.source_files import photographs
from components.corpus.selection.rules import count_by_reason, select
from components.corpus.source_sample import spread
from components.files.weight_folders import WeightsMissing
from components.images.decoding import ImageUndecodable, image_bytes, read_header
from components.settings.schema import Settings
from components.signals.candidate import measure_image
from components.telemetry.wording import legible

READ = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff"),
    *(".avif", ".bmp", ".gif"),
)
"""Endings of what the decoder reads."""
NOT_READ = (
    *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
    *(".orf", ".rw2", ".raf"),
)
"""Endings of pictures that have to be converted first."""

_HEADERS = 2000
_MEASURED = 24
_OVERSAMPLING = 4
"""Pixels of a photograph per pixel of training, at least: twice the edge leaves room to crop."""
_SUBJECT_PHOTOGRAPHS = 100
"""Up to so many photographs without captions are taken for those of one subject."""
_NAMED_CAUSES = 3
_MANY = 0.5
"""Share of a sample that a rule rejects from which on its threshold is worth a line."""


@dataclass(frozen=True)
class FolderSurvey:
    """What a folder holds."""

    folder: Path
    endings: dict[str, int]
    """Files by lower-case ending, of `READ` and `NOT_READ`."""
    nested: bool
    pixels: tuple[int, ...]
    """width * height of readable headers in the sample."""
    unreadable: tuple[str, ...]
    """Reasons of the others."""
    measured: tuple[dict[str, Any], ...]
    """`measure_image` of a smaller sample."""
    captions: FolderCaptions
    has_attribution: bool
    captioner: str | None = None
    """Folder of a captioning model (`local_captioner`)."""

    @property
    def photographs(self) -> int:
        """Files that the decoder reads by their endings."""
        return sum(number for ending, number in self.endings.items() if ending in READ)

    @property
    def captioned(self) -> int:
        """Photographs that bring a caption."""
        return self.captions.lines + self.captions.files


@dataclass
class Proposal:
    """Settings for a folder, and why."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Section -> key -> value, or of a nested section key -> value: what differs from the
    profile."""
    remarks: list[str] = field(default_factory=list)

    def set(self, section: str, key: str, value: Any, why: str) -> None:
        """Propose a value."""
        self.settings.setdefault(section, {})[key] = value
        self.remarks.append(f"{section}.{key}: {value!r}: {why}")


def survey(
    folder: Path, *, attribution: str, captions: str, captioner: str | None = None
) -> FolderSurvey:
    """Look into a folder.

    Args:
        folder: photographs, perhaps in folders of its own.
        attribution: name of the table of authors and licences.
        captions: name of the JSONL file of captions.
        captioner: a captioning model that is at hand, see `local_captioner`.

    Raises:
        ValueError: no folder, or no photograph in it; one line.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a folder of photographs")
    endings: Counter[str] = Counter()
    found: list[Path] = []
    for path in photographs(folder, (*READ, *NOT_READ)):
        ending = path.suffix.lower()
        endings[ending] += 1
        if ending in READ:
            found.append(path)
    if not found:
        others = ", ".join(f"{number} {ending}" for ending, number in endings.most_common())
        raise ValueError(
            f"{folder}: no photographs ({', '.join(READ)})"
            + (f"; convert what is there: {others}" if others else "")
        )
    found.sort()
    pixels, unreadable = _headers(spread(found, _HEADERS))
    regular = [path for path in found if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in found]
    return FolderSurvey(
        folder=folder,
        endings=dict(endings.most_common()),
        nested=any(path.parent != folder for path in found),
        pixels=tuple(pixels),
        unreadable=tuple(unreadable),
        measured=tuple(measure_image(path) for path in spread(regular, _MEASURED)),
        captions=captions_in(folder, captions, names, READ),
        has_attribution=(folder / attribution).is_file(),
        captioner=captioner,
    )


def _headers(paths: Sequence[Path]) -> tuple[list[int], list[str]]:
    pixels, unreadable = [], []
    for path in paths:
        try:
            header = read_header(image_bytes(path))
        except ImageUndecodable as problem:
            unreadable.append(f"{legible(path.name)}: {problem}")
        else:
            pixels.append(header.width * header.height)
    return pixels, unreadable


def local_captioner(root: Path) -> str | None:
    """The first folder of weights/ that holds a model which captions pictures, below `root`.

    Told from other networks by its chat template; nothing is loaded.
    """
    for config in sorted((root / "weights").glob("*/config.json")):
        folder = config.parent
        tokenizer = folder / "tokenizer_config.json"
        talks = any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json")) or (
            tokenizer.is_file() and "chat_template" in tokenizer.read_text("utf-8", "replace")
        )
        with contextlib.suppress(WeightsMissing, OSError):
            if talks and check_folder(folder):
                return folder.relative_to(root).as_posix()
    return None


def propose(found: FolderSurvey, settings: Settings, source: str) -> Proposal:
    """Settings under which the folder becomes a corpus.

    Args:
        found: survey of the folder.
        settings: of the profile to start from.
        source: what `ingest.source` is to be.
    """
    proposal = Proposal()
    if settings.ingest.kind != "folder":
        proposal.set("ingest", "kind", "folder", "photographs in a folder")
    proposal.set("ingest", "source", source, f"{found.photographs:,} photographs")
    _propose_reading(found, settings, proposal)
    _propose_size(found, settings, proposal)
    _propose_captions(found, settings, proposal)
    _propose_slices(found, settings, proposal)
    return proposal


def _propose_reading(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    known = settings.ingest.extensions
    new = [ending for ending in found.endings if ending in READ and ending not in known]
    if new:
        counted = ", ".join(f"{found.endings[ending]} {ending}" for ending in new)
        proposal.set("ingest", "extensions", [*known, *new], f"{counted} would be passed over")
    unread = {end: number for end, number in found.endings.items() if end in NOT_READ}
    if unread:
        counted = ", ".join(f"{number} {ending}" for ending, number in unread.items())
        proposal.remarks.append(f"not read: {counted}; convert them to one of {', '.join(READ)}")
    if found.nested and not settings.ingest.recursive:
        proposal.set("ingest", "recursive", True, "there are photographs in folders of the folder")
    if not found.has_attribution:
        proposal.set("ingest", "attribution", None, "no such file: authors, licences unknown")
    elif settings.ingest.attribution is None:
        proposal.set("ingest", "attribution", "ATTRIBUTION.csv", "the file is there")
    if found.unreadable:
        proposal.remarks.append(
            f"{len(found.unreadable)} of {len(found.unreadable) + len(found.pixels)} files that "
            f"were looked at cannot be read, such as {found.unreadable[0]}"
        )


def _propose_size(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    limit, training = settings.select.min_pixels, settings.buckets.target_pixels
    small = sum(pixels < limit for pixels in found.pixels)
    if not small:
        return
    lost = f"{small} of {len(found.pixels)} photographs have fewer than {limit:,} pixels"
    if training is None or training * _OVERSAMPLING >= limit:
        proposal.remarks.append(
            f"select.min_pixels: {limit}: {lost} and will be rejected; the median has "
            f"{statistics.median(found.pixels):,.0f}"
        )
        return
    proposal.set(
        "select",
        "min_pixels",
        training * _OVERSAMPLING,
        f"{lost}, and this profile trains at {training:,}",
    )


def _propose_captions(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    caption = settings.caption
    if found.captions.problem is not None:
        mend = (
            ""
            if settings.caption.provider == "shipped" and not found.captioned
            else ("; mend or remove it, or the stage caption ends with this")
        )
        proposal.remarks.append(f"not read: {found.captions.problem}{mend}")
    if found.captions.unread:
        proposal.remarks.append(_unread(found.captions.unread))
    if not found.captioned:
        if caption.provider == "shipped":
            _propose_captioner(found, settings, proposal)
        return
    places = [(found.captions.lines, f"lines of {caption.file}")]
    places.append((found.captions.files, "text files beside photographs"))
    listed = " and ".join(f"{number:,} {what}" for number, what in places if number)
    proposal.remarks.append(f"captions: {listed}, for {found.photographs:,} photographs")
    outside = [n for n in found.captions.words if not caption.min_words <= n <= caption.max_words]
    if outside:
        low, high = min(found.captions.words), max(found.captions.words)
        why = f"captions have {low} to {high} words, {len(outside)} outside the profile's bounds"
        if low < caption.min_words:
            proposal.set("caption", "min_words", low, why)
        if high > caption.max_words:
            proposal.set("caption", "max_words", high, why)
    if flawed := flaws(found.captions.looked_at.values(), _with(settings, proposal).caption):
        proposal.remarks.append(f"captions that are rejected: {flawed}")
    without = found.photographs - found.captioned
    if without > 0 and caption.provider == "shipped":
        proposal.remarks.append(
            f"{without:,} photographs without a caption are rejected; caption.provider: local or "
            "endpoint would write theirs (docs/corpus.md)"
        )


def _unread(losses: Sequence[CaptionLoss]) -> str:
    """How many captions cannot be read, and one of each cause."""
    causes = Counter(loss.detail for loss in losses)
    firsts = {loss.detail: loss for loss in reversed(losses)}
    named = [
        f"{legible(Path(firsts[cause].record).name)}: {cause}"
        + (f" (and {number - 1} more)" if number > 1 else "")
        for cause, number in causes.most_common(_NAMED_CAUSES)
    ]
    return f"captions that cannot be read: {len(losses)}, such as {'; '.join(named)}"


def _propose_captioner(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    """No photograph brings a caption: a model that is there, else one text for all."""
    none = {"provider": "none"}
    if found.captioner is not None:
        proposal.set("caption", "provider", "local", f"no captions, and {found.captioner} is there")
        local = {"folder": found.captioner, "batch_size": 4, "max_new_tokens": 300}
        proposal.set("caption", "local", local, "a model that looks at pictures")
    else:
        few = found.photographs <= _SUBJECT_PHOTOGRAPHS
        name = " ".join(re.split(r"[\W_]+", found.folder.resolve().name.lower())).strip()
        text = f"a photo of {name}" if few and name else "a photograph"
        none_found = f"no {settings.caption.file} and no text file beside a photograph"
        proposal.set(
            "caption",
            "provider",
            "fixed",
            ("no caption can be read" if found.captions.unread else none_found)
            + f". For captions of their own: provider local ({COMMAND}) or endpoint "
            "(docs/corpus.md)",
        )
        proposal.set("caption", "text", text, "of every photograph; say what they show")
    if found.captions.problem is not None:
        proposal.set("caption", "provided", "ignore", "what lies there cannot be read")
    proposal.set("caption", "translate", none, "captions that are made here bring no translation")


def _with(settings: Settings, proposal: Proposal) -> Settings:
    """With what has been proposed so far, as far as it decides what is left of a folder."""
    changed = {
        section: getattr(settings, section).model_copy(
            update={
                key: value
                for key, value in proposal.settings.get(section, {}).items()
                if not isinstance(value, dict)
            }
        )
        for section in ("select", "caption")
    }
    return settings.model_copy(update=changed)


def _propose_slices(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    """Small slices for a small corpus: what is held out must not be all of it."""
    left = expected(found, _with(settings, proposal))
    held_out = settings.slices.eval_min_images
    if held_out > 1 and left < 4 * held_out:
        why = f"about {left:.0f} photographs will be left"
        proposal.set("slices", "eval_min_images", max(1, int(left / 8)), why)
    if settings.slices.min_images > max(1, left / 2):
        proposal.set("slices", "min_images", max(1, int(left / 4)), "as many as there are")


def survivors(found: FolderSurvey, settings: Settings) -> dict[str, int]:
    """How many of the measured sample each rule rejects; `count_by_reason`."""
    return count_by_reason(_judged(found, settings))


def _judged(found: FolderSurvey, settings: Settings) -> pd.DataFrame:
    """The measured sample by the rules of the stage `select`; image_id is the path.

    Rules that need scores, other pictures or the whole are left out.
    """
    rows = pd.DataFrame(
        [
            {
                "image_id": str(row["path"]),
                "integrity": row.get("error") if row["entropy_bits"] is None else "ok",
                "duplicate_of": None,
                "width": row["width"],
                "height": row["height"],
                "flat_fraction": row["flat_fraction"],
                "entropy_bits": row["entropy_bits"],
            }
            for row in found.measured
        ]
    )
    # A quota or a near-duplicate rule over two dozen of many thousand would say nothing of the
    # whole.
    alone = settings.select.model_copy(
        update={
            "max_nsfw": None,
            "max_drawing": None,
            "min_quality": None,
            "near_duplicate_distance": None,
            "aesthetic_top_fraction": 1.0,
            "aspect_quotas": (),
            "character_quota": None,
            "target_images": None,
        }
    )
    return select(rows, alone)


def expected(found: FolderSurvey, settings: Settings) -> float:
    """How many photographs of the whole folder will be left: by their pixels and captions.

    Where all were measured they are counted. Of more, which have captions is taken to be
    independent of their pixels: of two dozen measured, perhaps none has one of a hundred captions.
    """
    judged, captions = _judged(found, settings), found.captions.looked_at
    kept = judged.loc[judged["kept"], "image_id"]
    if found.photographs <= _MEASURED:
        names = [Path(path).relative_to(found.folder).as_posix() for path in kept]
        return sum(is_taken(captions.get(name), settings.caption) for name in names)
    taken = sum(is_taken(caption, settings.caption) for caption in captions.values())
    with_caption = found.captioned * taken / max(1, len(captions))
    if is_taken(None, settings.caption):
        with_caption += found.photographs - found.captioned
    return with_caption * len(kept) / len(judged)


def advice(found: FolderSurvey, settings: Settings) -> list[str]:
    """What will stop a run, and for each threshold that rejects most what would keep more."""
    lines = []
    held_out = settings.slices.eval_min_images
    lacking = found.captioned < found.photographs and not is_taken(None, settings.caption)
    if round(expected(found, settings)) <= held_out:
        lines.append(
            f"too few are left: slices.eval_min_images holds out {held_out}, and there must be one "
            "more to train on; add photographs"
            + (", or captions to those without" if lacking else "")
        )
    for name, key, limit, keeps_below in (
        ("flat_fraction", "max_flat_fraction", settings.select.max_flat_fraction, True),
        ("entropy_bits", "min_entropy_bits", settings.select.min_entropy_bits, False),
    ):
        values = sorted(
            (row[name] for row in found.measured if row[name] is not None), reverse=not keeps_below
        )
        lost = [v for v in values if (v > limit if keeps_below else v < limit)]
        if values and len(lost) / len(values) >= _MANY:
            # The value that three of four pass.
            other = values[min(len(values) - 1, (3 * len(values)) // 4)]
            lines.append(
                f"select.{key}: {limit:g} rejects {len(lost)} of {len(values)} measured; "
                f"{other:.3g} would keep three of four"
            )
    return lines
