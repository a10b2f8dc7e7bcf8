"""Captions that came with the images: in their records, in a file, or in texts beside them.

Nobody pays for them again: they are checked like all others and named in the manifest as provided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from components.corpus.captions.caption_files import (
    CaptionLoss,
    Sidecars,
    read_captions,
)
from components.corpus.captions.checks import PROVIDED, Caption, Judged, judge_provided
from components.corpus.sources.folder import file_name, source_folder
from components.settings.captions import CaptionSettings
from components.settings.corpus import IngestSettings

_ORIGINS = {
    "multiaspect": "released metadata",
    "urls": "list of addresses",
    "webdataset": "archive",
}
"""`ingest.kind` -> what brought the caption."""
_SIDECAR_ORIGIN = f"{PROVIDED}text file"

NOT_PROVIDED = Judged(None, None, "missing", None, None)


@dataclass(frozen=True)
class ProvidedCaptions:
    """What came with each image, checked."""

    rows: list[Judged]
    """One per manifest row, in order; status "missing" where nothing came."""
    losses: list[CaptionLoss] = field(default_factory=list)
    """Lines and files that gave no caption, or one that had to be mended."""


def _judge(caption: Caption, was_kept: bool, settings: CaptionSettings, origin: str) -> Judged:
    """Checks cost most of this stage: of a photograph that was rejected the text alone is kept."""
    if was_kept:
        return judge_provided(caption, settings, origin)
    english = caption.english if caption.english.strip() else None
    chinese = caption.chinese if caption.chinese and caption.chinese.strip() else None
    return Judged(
        english,
        chinese,
        None if english else "missing",
        origin if english else None,
        origin if chinese else None,
    )


def _from_records(manifest: pd.DataFrame, kind: str, settings: CaptionSettings) -> list[Judged]:
    """Captions that ingest found in the records of its source."""
    origin = f"{PROVIDED}{_ORIGINS[kind]}"
    texts = manifest[["caption_en", "caption_zh"]].astype(object)
    texts = texts.where(texts.notna(), None)
    pairs = texts.itertuples(index=False, name=None)
    return [
        _judge(Caption(english or "", chinese), was_kept, settings, origin)
        for (english, chinese), was_kept in zip(pairs, manifest["kept"].eq(True), strict=True)
    ]


def _from_folder(
    manifest: pd.DataFrame, ingest: IngestSettings, settings: CaptionSettings, root: Path
) -> ProvidedCaptions:
    """Captions of the file in a folder of photographs, and of text files where it has no line."""
    if settings.provider != "shipped" and not (root / ingest.source).is_dir():
        # Models look at derivatives: the photographs themselves may be gone by now.
        return ProvidedCaptions([NOT_PROVIDED] * len(manifest))
    folder = source_folder(ingest, root)
    files = [file_name(uri, folder, root) for uri in manifest["uri"]]
    sidecars = Sidecars(folder)
    beside = [sidecars.find(file) for file in files]
    captions: dict[str, Caption] = {}
    losses: list[CaptionLoss] = []
    path = folder / settings.file
    # Beside models and text files the file is welcome, but nothing that must be there.
    if path.exists() or (settings.provider == "shipped" and not any(beside)):
        captions, losses = read_captions(path, set(files))
    origin = f"{PROVIDED}{settings.file}"
    rows = []
    for file, sidecar, was_kept in zip(files, beside, manifest["kept"].eq(True), strict=True):
        if file in captions:
            rows.append(_judge(captions[file], was_kept, settings, origin))
            continue
        row = NOT_PROVIDED
        if sidecar is not None:
            try:
                caption = Caption(sidecars.read(sidecar), None)
                row = _judge(caption, was_kept, settings, _SIDECAR_ORIGIN)
            except ValueError as problem:
                losses.append(CaptionLoss(sidecar, str(problem)))
        rows.append(row)
    return ProvidedCaptions(rows, losses)


def provided_captions(
    manifest: pd.DataFrame, ingest: IngestSettings, settings: CaptionSettings, root: Path
) -> ProvidedCaptions:
    """What came with each image; of rows that were kept it is checked.

    Args:
        manifest: uri, kept, caption_en, caption_zh.
        ingest: where the images came from.
        settings: `provided` and the bounds of the checks.
        root: repository root.

    Raises:
        ValueError: no line of the captions file can be used, or it is missing although neither a
            model nor a text file stands in for it.
    """
    if settings.provided == "ignore":
        return ProvidedCaptions([NOT_PROVIDED] * len(manifest))
    if ingest.kind == "folder":
        return _from_folder(manifest, ingest, settings, root)
    return ProvidedCaptions(_from_records(manifest, ingest.kind, settings))
