"""Captions that came with the images: in their records, in a file, or in texts beside them.

Nobody pays for them again: they are checked like all others and named in the manifest as provided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

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


class ProvidedCaptions(Protocol):
    """What came with each image, checked as often as it is asked."""

    @property
    def losses(self) -> list[CaptionLoss]:
        """Lines and files that gave no caption so far, or one that had to be mended."""

    def of(self, manifest: pd.DataFrame) -> list[Judged]:
        """One per row, in order; status "missing" where nothing came.

        Args:
            manifest: some rows: image_id, uri, kept, caption_en, caption_zh.
        """


class _None:
    """Nothing came, or nothing of it is wanted."""

    losses: ClassVar[list[CaptionLoss]] = []

    def of(self, manifest: pd.DataFrame) -> list[Judged]:
        return [NOT_PROVIDED] * len(manifest)


class _OfRecords:
    """Captions that ingest found in the records of its source."""

    losses: ClassVar[list[CaptionLoss]] = []

    def __init__(self, kind: str, settings: CaptionSettings) -> None:
        self._origin = f"{PROVIDED}{_ORIGINS[kind]}"
        self._settings = settings

    def of(self, manifest: pd.DataFrame) -> list[Judged]:
        texts = manifest[["caption_en", "caption_zh"]].astype(object)
        texts = texts.where(texts.notna(), None)
        pairs = texts.itertuples(index=False, name=None)
        return [
            _judge(Caption(english or "", chinese), was_kept, self._settings, self._origin)
            for (english, chinese), was_kept in zip(pairs, manifest["kept"].eq(True), strict=True)
        ]


class _OfFolder:
    """Captions of the file in a folder of photographs, and of text files where it has no line."""

    def __init__(
        self,
        uris: Iterable[str],
        copies: Mapping[str, Sequence[str]],
        ingest: IngestSettings,
        settings: CaptionSettings,
        root: Path,
    ) -> None:
        self._copies = copies
        self._folder = source_folder(ingest, root)
        self._root = root
        self._settings = settings
        self._sidecars = Sidecars(self._folder, ingest.extensions)
        self._origin = f"{PROVIDED}{settings.file}"
        self._captions: Mapping[str, Caption] = {}
        self._lines_lost: list[CaptionLoss] = []
        # By name: a file that is read again is lost once.
        self._files_lost: dict[str, CaptionLoss] = {}
        path = self._folder / settings.file
        has_file = path.exists()
        if not has_file and settings.provider != "shipped":
            return
        files = [file_name(uri, self._folder, root) for uri in uris]
        # Beside models and text files the file is welcome, but nothing that must be there.
        if has_file or not any(map(self._sidecars.has, files)):
            self._captions, self._lines_lost = read_captions(path, files)

    @property
    def losses(self) -> list[CaptionLoss]:
        unclaimed = self._sidecars.unclaimed(self._settings.file)
        return [*self._lines_lost, *self._files_lost.values(), *([unclaimed] if unclaimed else [])]

    def of(self, manifest: pd.DataFrame) -> list[Judged]:
        rows = zip(manifest["image_id"], manifest["uri"], manifest["kept"].eq(True), strict=True)
        return [self._of_image(*row) for row in rows]

    def _of_image(self, image_id: str, uri: str, was_kept: bool) -> Judged:
        """The row's own caption, else that of the first copy of its bytes that has one."""
        own = self._row(file_name(uri, self._folder, self._root), was_kept)
        if not was_kept or own != NOT_PROVIDED:
            return own
        copies = (
            file_name(one, self._folder, self._root) for one in self._copies.get(image_id, ())
        )
        found = (self._row(file, was_kept) for file in copies)
        return next((one for one in found if one != NOT_PROVIDED), own)

    def _row(self, file: str, was_kept: bool) -> Judged:
        if (caption := self._captions.get(file)) is not None:
            return _judge(caption, was_kept, self._settings, self._origin)
        sidecar = file
        try:
            found = self._sidecars.find(file)
            if found is None:
                return NOT_PROVIDED
            sidecar = found
            caption = Caption(self._sidecars.read(sidecar), None)
        except ValueError as problem:
            self._files_lost[sidecar] = CaptionLoss(sidecar, str(problem))
            return NOT_PROVIDED
        return _judge(caption, was_kept, self._settings, _SIDECAR_ORIGIN)


def provided_captions(
    uris: Iterable[str],
    copies: Mapping[str, Sequence[str]],
    ingest: IngestSettings,
    settings: CaptionSettings,
    root: Path,
) -> ProvidedCaptions:
    """What came with the images of a manifest; of rows that were kept it is checked.

    Args:
        uris: of the whole manifest; read only where names must be known.
        copies: `uri` of byte-identical copies by image_id; theirs is what the original lacks.
        ingest: where the images came from.
        settings: `provided` and the bounds of the checks.
        root: repository root.

    Raises:
        ValueError: no line of the captions file can be used, or it is missing although neither a
            model nor a text file stands in for it.
    """
    if settings.provided == "ignore":
        return _None()
    if ingest.kind != "folder":
        return _OfRecords(ingest.kind, settings)
    if settings.provider != "shipped" and not (root / ingest.source).is_dir():
        # Models look at derivatives: the photographs themselves may be gone by now.
        return _None()
    return _OfFolder(uris, copies, ingest, settings, root)
