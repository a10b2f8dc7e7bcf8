"""Captions that came with the images, in their records or in a file beside the photographs.

Nobody pays for them again: they are checked like all others and named in the manifest as provided.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

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

NOT_PROVIDED = Judged(None, None, "missing", None, None)


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


def _from_records(manifest: pd.DataFrame, kind: str, settings: CaptionSettings) -> list[Judged]:
    """Captions that ingest found in the records of its source."""
    origin = f"{PROVIDED}{_ORIGINS[kind]}"
    texts = manifest[["caption_en", "caption_zh"]].astype(object)
    texts = texts.where(texts.notna(), None)
    return [
        judge_provided(Caption(english or "", chinese), settings, origin)
        for english, chinese in texts.itertuples(index=False, name=None)
    ]


def _from_file(
    manifest: pd.DataFrame, ingest: IngestSettings, settings: CaptionSettings, root: Path
) -> list[Judged]:
    """Captions of the file in a folder of photographs."""
    if settings.provider == "endpoint" and not (root / ingest.source / settings.file).is_file():
        # Models write them all; with them a file is welcome but nothing that must be there.
        return [NOT_PROVIDED] * len(manifest)
    folder = source_folder(ingest, root)
    files = [file_name(uri, folder, root) for uri in manifest["uri"]]
    captions = read_captions(folder / settings.file, set(files))
    origin = f"{PROVIDED}{settings.file}"
    return [
        judge_provided(captions[file], settings, origin) if file in captions else NOT_PROVIDED
        for file in files
    ]


def provided_captions(
    manifest: pd.DataFrame, ingest: IngestSettings, settings: CaptionSettings, root: Path
) -> list[Judged]:
    """What came with each image, checked; status "missing" where nothing did.

    Args:
        manifest: uri, caption_en, caption_zh.
        ingest: where the images came from.
        settings: `provided` and the bounds of the checks.
        root: repository root.

    Returns:
        one per row, in order.

    Raises:
        ValueError: the captions file is wrong (with the line), or missing although no model stands
            in for it.
    """
    if settings.provided == "ignore":
        return [NOT_PROVIDED] * len(manifest)
    if ingest.kind == "folder":
        return _from_file(manifest, ingest, settings, root)
    return _from_records(manifest, ingest.kind, settings)
