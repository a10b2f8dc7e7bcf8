"""A folder of photographs before anything is set: what is in it, and which rules would reject it.

Headers of a sample are read, a few pictures are measured, captions are counted: seconds, whatever
the folder holds.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.captions.caption_files import CaptionLoss, Sidecars, read_captions
from components.corpus.captions.checks import Caption
from components.corpus.captions.local import COMMAND, check_folder
from components.corpus.listing.source_files import photographs
from components.corpus.selection.rules import count_by_reason, select
from components.corpus.sources.records.source_records import shown_name
from components.files.weight_folders import WeightsMissing
from components.images.decoding import ImageUndecodable, image_bytes, read_header
from components.settings.schema import Settings
from components.signals.candidate import measure_image

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
    caption_words: tuple[int, ...]
    """Words of each English caption of captions.jsonl, and of the text files that were looked
    at."""
    caption_lines: int
    """Photographs with a caption in captions.jsonl."""
    caption_files: int
    """Other photographs with a text file beside them, without those of `caption_unread`."""
    caption_problem: str | None
    """Why captions.jsonl is of no use as a whole; one line."""
    has_attribution: bool
    caption_unread: tuple[CaptionLoss, ...] = ()
    """Captions of which the stage `caption` can make nothing, of those that were looked at."""
    captioner: str | None = None
    """Folder of a captioning model (`local_captioner`)."""

    @property
    def photographs(self) -> int:
        """Files that the decoder reads by their endings."""
        return sum(number for ending, number in self.endings.items() if ending in READ)

    @property
    def captioned(self) -> int:
        """Photographs that bring a caption."""
        return self.caption_lines + self.caption_files


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


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly from the first to the last."""
    if len(paths) <= count:
        return list(paths)
    # Not the first ones: names often hold dates, and the first day is not the collection.
    return [paths[round(n * (len(paths) - 1) / (count - 1))] for n in range(count)]


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
    pixels, unreadable = _headers(_spread(found, _HEADERS))
    regular = [path for path in found if path.is_file()]
    brought = _captions(folder, captions, found)
    return FolderSurvey(
        folder=folder,
        endings=dict(endings.most_common()),
        nested=any(path.parent != folder for path in found),
        pixels=tuple(pixels),
        unreadable=tuple(unreadable),
        measured=tuple(measure_image(path) for path in _spread(regular, _MEASURED)),
        caption_words=tuple(brought.words),
        caption_lines=brought.lines,
        caption_files=brought.files,
        caption_problem=brought.problem,
        caption_unread=tuple(brought.unread),
        has_attribution=(folder / attribution).is_file(),
        captioner=captioner,
    )


def _headers(paths: Sequence[Path]) -> tuple[list[int], list[str]]:
    pixels, unreadable = [], []
    for path in paths:
        try:
            header = read_header(image_bytes(path))
        except ImageUndecodable as problem:
            unreadable.append(f"{shown_name(path)}: {problem}")
        else:
            pixels.append(header.width * header.height)
    return pixels, unreadable


@dataclass
class _Brought:
    """Captions that lie in a folder."""

    words: list[int] = field(default_factory=list)
    lines: int = 0
    files: int = 0
    unread: list[CaptionLoss] = field(default_factory=list)
    problem: str | None = None

    def takes(self, record: str, text: str) -> bool:
        """Whether a text is a caption; counts it or its loss."""
        count = len(text.split())
        if count:
            self.words.append(count)
        else:
            self.unread.append(CaptionLoss(record, "empty"))
        return count > 0


def _captions(folder: Path, file: str, photographs: Sequence[Path]) -> _Brought:
    """What the stage `caption` will find, by its own readers; text files of a sample are read."""
    names = [path.relative_to(folder).as_posix() for path in photographs]
    found = _Brought()
    captions: Mapping[str, Caption] = {}
    if (folder / file).is_file():
        try:
            captions, _ = read_captions(folder / file, names)
        except ValueError as problem:
            found.problem = str(problem)
    found.lines = sum(found.takes(name, caption.english) for name, caption in captions.items())
    sidecars = Sidecars(folder, READ)
    beside = []
    for name in names:
        try:
            if name not in captions and (sidecar := sidecars.find(name)):
                beside.append(sidecar)
        except ValueError as problem:
            found.unread.append(CaptionLoss(name, str(problem)))
    found.files = len(beside)
    for path in _spread([Path(sidecar) for sidecar in beside], _HEADERS):
        name = path.as_posix()
        try:
            found.files -= not found.takes(name, sidecars.read(name))
        except ValueError as problem:
            found.unread.append(CaptionLoss(name, str(problem)))
            found.files -= 1
    return found


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
    if found.caption_problem is not None:
        mend = (
            ""
            if settings.caption.provider == "shipped" and not found.captioned
            else ("; mend or remove it, or the stage caption ends with this")
        )
        proposal.remarks.append(f"not read: {found.caption_problem}{mend}")
    if found.caption_unread:
        proposal.remarks.append(_unread(found.caption_unread))
    if not found.captioned:
        if caption.provider == "shipped":
            _propose_captioner(found, settings, proposal)
        return
    places = [(found.caption_lines, f"lines of {caption.file}")]
    places.append((found.caption_files, "text files beside photographs"))
    listed = " and ".join(f"{number:,} {what}" for number, what in places if number)
    proposal.remarks.append(f"captions: {listed}, for {found.photographs:,} photographs")
    outside = [n for n in found.caption_words if not caption.min_words <= n <= caption.max_words]
    if outside:
        low, high = min(found.caption_words), max(found.caption_words)
        why = f"captions have {low} to {high} words, {len(outside)} outside the profile's bounds"
        if low < caption.min_words:
            proposal.set("caption", "min_words", low, why)
        if high > caption.max_words:
            proposal.set("caption", "max_words", high, why)
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
        f"{shown_name(Path(firsts[cause].record))}: {cause}"
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
            ("no caption can be read" if found.caption_unread else none_found)
            + f". For captions of their own: provider local ({COMMAND}) or endpoint "
            "(docs/corpus.md)",
        )
        proposal.set("caption", "text", text, "of every photograph; say what they show")
    if found.caption_problem is not None:
        proposal.set("caption", "provided", "ignore", "what lies there cannot be read")
    proposal.set("caption", "translate", none, "captions that are made here bring no translation")


def _propose_slices(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    """Small slices for a small corpus: what is held out must not be all of it."""
    # With what has just been proposed: a lower bound on pixels keeps more.
    select_now = settings.select.model_copy(update=proposal.settings.get("select", {}))
    expected = _expected(found, settings.model_copy(update={"select": select_now}))
    held_out = settings.slices.eval_min_images
    if held_out > 1 and expected < 4 * held_out:
        why = f"about {expected:.0f} photographs will be left"
        proposal.set("slices", "eval_min_images", max(1, int(expected / 8)), why)
    if settings.slices.min_images > max(1, expected / 2):
        proposal.set("slices", "min_images", max(1, int(expected / 4)), "as many as there are")


def survivors(found: FolderSurvey, settings: Settings) -> dict[str, int]:
    """How many of the measured sample each rule rejects; `count_by_reason`.

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
    return count_by_reason(select(rows, alone))


def _expected(found: FolderSurvey, settings: Settings) -> float:
    """How many photographs of the whole folder will be left."""
    counts = survivors(found, settings)
    return found.photographs * counts["kept"] / counts["candidates"]


def advice(found: FolderSurvey, settings: Settings) -> list[str]:
    """What will stop a run, and for each threshold that rejects most what would keep more."""
    lines = []
    held_out = settings.slices.eval_min_images
    if round(_expected(found, settings)) <= held_out:
        lines.append(
            f"too few are left: slices.eval_min_images holds out {held_out}, and there must be one "
            "more to train on; add photographs"
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
