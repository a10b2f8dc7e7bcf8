"""A sample of a source, for a rehearsal: how many items there are, and a small copy of a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from components.corpus.captions.caption_files import Sidecars
from components.corpus.listing.source_files import photographs
from components.corpus.sources.multiaspect import read_metadata_shards
from components.corpus.sources.records.source_records import SourceEnd, source_files
from components.corpus.sources.url_lists import read_url_lists
from components.corpus.sources.webdataset import ARCHIVE_ENDINGS
from components.settings.corpus import IngestSettings

Item = TypeVar("Item")


def count_items(
    settings: IngestSettings, root: Path, *, at_most: int | None = None, seconds: float = 5.0
) -> int | None:
    """Photographs, records or (of archives) members of a source.

    Args:
        settings: the source.
        root: where a relative source starts.
        at_most: counting ends there; None: all.
        seconds: counting is given up after that long, unless `at_most` is reached before.

    Returns:
        the number, at most `at_most`; None: not counted in that time.

    Raises:
        ValueError: lists that would be misread, or no usable source.
    """
    source = root / settings.source
    items: Iterator[object]
    if settings.kind == "folder":
        items = photographs(source, settings.extensions, recursive=settings.recursive)
    elif settings.kind == "urls":
        items = read_url_lists(source, settings.source, settings.lists)
    elif settings.kind == "multiaspect":
        items = read_metadata_shards(source, settings.source, settings.lists)
    else:
        items = _members(source)
    # Readers close each file with their own count of it, which is no item.
    items = (item for item in items if not isinstance(item, SourceEnd))
    end = time.monotonic() + seconds
    number = 0
    for _ in islice(items, at_most):
        number += 1
        # A folder is counted to its end: its names come quickly, and every estimate rests on them.
        if time.monotonic() > end and settings.kind != "folder":
            return None
    return number


def _members(source: Path) -> Iterator[object]:
    """Members of all archives by their headers; a damaged archive ends where it is damaged."""
    import tarfile

    for path in source_files(source, ARCHIVE_ENDINGS, source.name):
        try:
            with tarfile.open(path) as archive:
                yield from archive
        except (tarfile.TarError, OSError, EOFError):
            continue


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, evenly from the first to the last.

    Not the first ones: names often hold dates, and the first day is not the collection.
    """
    if len(items) <= count:
        return list(items)
    return [items[round(n * (len(items) - 1) / max(1, count - 1))] for n in range(count)]


def copy_sample(settings: IngestSettings, root: Path, target: Path, count: int, file: str) -> int:
    """Bring photographs from all over a folder, and what describes them, to another folder.

    Hard links where the file system allows them, else copies. Tables beside the photographs come
    whole, so that a wrong line is found wherever it stands, less lines of `file` that belong to
    photographs outside the sample.

    Args:
        settings: a source of kind `folder`.
        root: where a relative source starts.
        target: folder to fill.
        count: photographs, evenly spread over the sorted paths.
        file: JSONL file of captions in the source.

    Returns:
        photographs that were brought; fewer than `count` where some are no regular files.
    """
    source = root / settings.source
    found = photographs(source, settings.extensions, recursive=settings.recursive)
    brought = [path for path in spread(sorted(found), count) if _bring(path, source, target)]
    sidecars = Sidecars(source, settings.extensions)
    for path in brought:
        # Where several fit the rehearsal has none, as the run will.
        with contextlib.suppress(ValueError):
            if beside := sidecars.find(path.relative_to(source).as_posix()):
                _bring(source / beside, source, target)
    for name in (settings.attribution, file):
        if name and (source / name).is_file():
            _bring(source / name, source, target)
    if (target / file).is_file():
        _leave_out_others(target / file, source, target)
    return len(brought)


def _bring(path: Path, source: Path, target: Path) -> bool:
    """Whether a regular file was linked or copied to its place below `target`."""
    real = path.resolve()
    # The rule of `ingest`: a rehearsal must not take what the run will refuse.
    if not real.is_file() or not real.is_relative_to(source.resolve()):
        return False
    place = target / path.relative_to(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real, place)
    except OSError:
        try:
            shutil.copy2(real, place)
        except OSError:
            return False
    return True


def _leave_out_others(captions: Path, source: Path, target: Path) -> None:
    """Drop lines of photographs that exist in the source and not in the sample."""
    kept = []
    for line in captions.read_bytes().split(b"\n"):
        try:
            name = json.loads(line)["file"]
            is_other = (source / name).is_file() and not (target / name).is_file()
        except (ValueError, LookupError, TypeError, OSError):
            # Wrong lines stay: they are what a rehearsal is for.
            is_other = False
        if not is_other:
            kept.append(line)
    # A new file: the old one is a link to the source's own.
    captions.unlink()
    captions.write_bytes(b"\n".join(kept))
