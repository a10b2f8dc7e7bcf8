"""WebDataset archives: images with JSON and text beside them, grouped by key.

Members are streamed into the store of originals under the hash of their bytes. Their names are only
ever labels: no path of an archive reaches the file system, and links and devices are passed over.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.corpus.sources.downloader import FetchFailed, settle
from components.corpus.sources.image_probe import PROBE_BYTES, image_extension
from components.corpus.sources.originals import OriginalWriter
from components.corpus.sources.url_lists import SourceRecord, parse_json, place_of, source_files
from components.files.parquet_files import storable
from components.settings.corpus import DownloadSettings

ARCHIVE_ENDINGS = (".tar", ".tgz", ".gz")
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "avif", "jxl", "img", "image"})
_MAX_SIDECAR_BYTES = 4 * 2**20
_MIB = 2**20


@dataclass
class _Sample:
    """Members of one key."""

    key: str
    images: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def records(self, archive: str) -> Iterator[SourceRecord]:
        """One record per image; a key without one is a broken record."""
        if self.others:
            self.values["other_members"] = self.others
        if not self.images:
            yield SourceRecord(f"{archive}#{self.key}", None, "no image under this key")
        for place in self.images:
            yield SourceRecord(place, self.values)


def _key_and_ending(name: str) -> tuple[str, str]:
    """WebDataset's split: the key ends at the first dot of the last path segment."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return storable(str(path.with_name(stem) if stem else path)), ending.lower()


def store_image(file: IO[bytes], folder: Path, settings: DownloadSettings) -> Stored | Loss:
    """Stream one image into the store.

    Args:
        file: its bytes.
        folder: the store of originals.
        settings: bounds on bytes and pixels.

    Returns:
        where it is, or why it is not there.
    """
    with OriginalWriter(folder) as writer:
        head = file.read(PROBE_BYTES)
        extension = image_extension(head)
        if extension is None:
            return Loss("wrong_content", f"starts with {head[:8].hex()}" if head else "empty")
        chunk = head
        while chunk:
            if writer.size_bytes + len(chunk) > settings.max_mb * _MIB:
                return Loss("too_large", f"more than {settings.max_mb:g} MiB")
            writer.write(chunk)
            chunk = file.read(_MIB)
        try:
            return settle(writer, extension, settings.min_pixels)
        except FetchFailed as failure:
            return failure.loss


def _read_sidecar(sample: _Sample, ending: str, file: IO[bytes]) -> None:
    text = file.read(_MAX_SIDECAR_BYTES + 1).decode("utf-8", "replace")
    if len(text) > _MAX_SIDECAR_BYTES:
        sample.values[f"{ending}_problem"] = f"sidecar above {_MAX_SIDECAR_BYTES} bytes"
    elif ending == "txt":
        sample.values.setdefault("txt", text.strip())
    else:
        try:
            values = parse_json(text)
        except ValueError as problem:
            sample.values["json_problem"] = str(problem)
            return
        if isinstance(values, dict):
            sample.values.update(values)
        else:
            sample.values["json"] = values


def _archive_records(
    path: Path, name: str, folder: Path, journal: DownloadJournal, settings: DownloadSettings
) -> Iterator[SourceRecord]:
    sample: _Sample | None = None
    places: set[str] = set()
    problem: str | None = None
    try:
        with tarfile.open(path, mode="r|*") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    continue
                key, ending = _key_and_ending(member.name)
                if sample is not None and sample.key != key:
                    yield from sample.records(name)
                    sample = None
                sample = sample or _Sample(key)
                if ending.rpartition(".")[2] in _IMAGES:
                    place = f"{name}#{key}.{ending}"
                    while place in places:
                        place += "+"
                    places.add(place)
                    result = store_image(file, folder, settings)
                    journal.put(place, Outcome(1, result))
                    sample.images.append(place)
                elif ending in ("json", "txt"):
                    _read_sidecar(sample, ending, file)
                else:
                    sample.others.append(storable(member.name))
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as caught:
        problem = f"broken archive: {' '.join(str(caught).split()) or type(caught).__name__}"
    if sample is not None:
        yield from sample.records(name)
    if problem is not None:
        yield SourceRecord(name, None, problem)


def read_webdataset(
    source: Path, shown: str, folder: Path, journal: DownloadJournal, settings: DownloadSettings
) -> Iterator[SourceRecord]:
    """One record per image of every archive, in sorted order of archives.

    Args:
        source: archive, or folder of archives.
        shown: how messages name it.
        folder: store of originals; receives every usable image.
        journal: receives the outcome of every image under the place of its record.
        settings: bounds on bytes and pixels.

    Raises:
        ValueError: no archives (see `source_files`).
    """
    for path in source_files(source, ARCHIVE_ENDINGS, shown):
        yield from _archive_records(path, place_of(path, source), folder, journal, settings)
