"""WebDataset archives: images with JSON and text beside them, grouped by key.

Members are streamed into the store of originals under the hash of their bytes. Their names are only
ever labels: no path of an archive reaches the file system. A hard link is the bytes of the member
that it names; a symbolic link is a counted loss, a device is counted.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from components.corpus.listing.source_files import is_of_system
from components.corpus.sources.download_journal import (
    DownloadJournal,
    FetchFailed,
    Loss,
    Outcome,
    Stored,
)
from components.corpus.sources.downloader import settle
from components.corpus.sources.image_probe import PROBE_BYTES, image_extension
from components.corpus.sources.originals import OriginalWriter, keep_originals
from components.corpus.sources.records.archive_samples import (
    SIDECARS,
    ArchiveSamples,
    Member,
    key_and_ending,
)
from components.corpus.sources.records.noting_tar import NotingTar
from components.corpus.sources.records.source_records import (
    SourceEnd,
    SourceItem,
    SourceRecord,
    place_of,
    source_files,
)
from components.files.parquet_files import storable
from components.settings.corpus import DownloadSettings

ARCHIVE_ENDINGS = (".tar", ".tgz", ".gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_READ = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "avif", "jxl", "img", "image"})
# Endings of pictures: what is in them is read if its bytes are of a kind that is read, and is a
# loss with a cause otherwise. Other members are images if their first bytes say so.
_RAW = frozenset({"dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "srw", "pef"})
_PICTURES = (
    _READ
    | _RAW
    | frozenset({"jpe", "jfif", "pjpeg", "heic", "heif", "hif", "gif", "bmp", "dib", "ico"})
    | frozenset({"jp2", "j2k", "jpx", "jxr", "psd", "svg", "tga", "exr", "hdr"})
    | frozenset({"ppm", "pgm", "pbm", "pnm"})
)
_MAX_SIDECAR_BYTES = 4 * 2**20
_MIB = 2**20
# Names are a stranger's: a hostile archive must not make the report as long as itself.
_NOTED_ENDINGS = 100
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)


class _ArchiveBroken(Exception):
    """Reading on is impossible; not raised for the store, whose trouble is the machine's."""


def _is_litter(name: str) -> bool:
    """Whether a folder's entry of this path would not be looked at; ".." is no name."""
    return any(is_of_system(part) for part in PurePosixPath(name).parts if part != "..")


def _read(file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except _ARCHIVE_ERRORS as problem:
        raise _ArchiveBroken(_one_line(problem)) from None


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def _store(head: bytes, file: IO[bytes], folder: Path, settings: DownloadSettings) -> Stored | Loss:
    """Stream one image into the store; `head` has been read from `file` already.

    Raises:
        _ArchiveBroken: the archive ends within the image.
        OSError: the store cannot be written.
    """
    extension = image_extension(head)
    if extension is None:
        return Loss("wrong_content", f"starts with {head[:8].hex()}" if head else "empty")
    with OriginalWriter(folder) as writer:
        chunk = head
        while chunk:
            # Counted as it comes, since a compressed archive's header may claim any size.
            if writer.size_bytes + len(chunk) > settings.max_mb * _MIB:
                return Loss("too_large", f"more than {settings.max_mb:g} MiB")
            writer.write(chunk)
            chunk = _read(file, _MIB)
        try:
            stored = settle(writer, extension, settings.min_pixels)
        except FetchFailed as failure:
            return failure.loss
        keep_originals([writer])
        return stored


class _Archive:
    """One archive on its way into the store.

    Args:
        name: of the archive in places.
        folder: the store of originals.
        journal: receives the outcome of every image.
        settings: bounds on bytes and pixels.
    """

    def __init__(
        self, name: str, folder: Path, journal: DownloadJournal, settings: DownloadSettings
    ) -> None:
        self._name = name
        self._folder = folder
        self._journal = journal
        self._settings = settings
        self._apart: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._total = 0

    def items(self, path: Path) -> Iterator[SourceItem]:
        """A record per image, a loss for what is broken, then the count of members."""
        with ArchiveSamples(self._name) as samples:
            # Read to the end before the first record: a caption may stand at the other end of the
            # archive.
            problem = self._read(path, samples)
            yield from samples.records()
        if problem is not None:
            yield SourceRecord(self._name, None, f"broken archive: {problem}", units=0)
        yield SourceEnd(self._name, "members", self._total, self._apart, self._notes)

    def _read(self, path: Path, samples: ArchiveSamples) -> str | None:
        """Take every member in; returns what may be missing after that."""
        try:
            archive = NotingTar.of(path)
        except _ARCHIVE_ERRORS as problem:
            return _one_line(problem)
        with archive:
            members = archive.in_order()
            while True:
                try:
                    member = next(members, None)
                except _ARCHIVE_ERRORS as problem:
                    return _one_line(problem)
                if member is None:
                    return archive.shortfall
                self._total += 1
                try:
                    self._take(archive, member, samples)
                except _ArchiveBroken as broken:
                    return str(broken)

    def _take(self, archive: NotingTar, member: tarfile.TarInfo, samples: ArchiveSamples) -> None:
        ending = key_and_ending(member.name)[1].rpartition(".")[2]
        if member.isdir():
            self._apart["folders"] += 1
        # macOS puts a "._a.jpg" beside every a.jpg, which is no picture.
        elif _is_litter(member.name):
            self._apart["of the system"] += 1
        # The archive of a folder holds equal files as hard links, and each name is a photograph of
        # its own.
        elif member.islnk():
            self._take_hard_link(member, ending, samples)
        elif member.issym() and ending in _PICTURES:
            loss = Loss("link", f"symbolic link to {member.linkname}; links are not followed")
            self._add_image(member.name, loss, samples)
        elif member.isreg():
            file = archive.extractfile(member)
            assert file is not None
            if ending in SIDECARS:
                self._take_sidecar(member.name, file, samples)
            else:
                self._take_file(member.name, ending, file, samples)
        else:
            self._apart["links" if member.issym() else "devices"] += 1

    def _take_hard_link(
        self, member: tarfile.TarInfo, ending: str, samples: ArchiveSamples
    ) -> None:
        target = samples.find(member.linkname)
        if target is not None and target.kind == "image":
            outcome = self._journal.get(target.place)
            assert outcome is not None
            self._add_image(member.name, outcome.result, samples)
        elif target is not None:
            self._add_other(replace(target, name=member.name), samples)
        elif ending in _PICTURES:
            loss = Loss("link", f"hard link to {member.linkname}, which is not there before it")
            self._add_image(member.name, loss, samples)
        else:
            self._apart["links"] += 1

    def _take_sidecar(self, name: str, file: IO[bytes], samples: ArchiveSamples) -> None:
        try:
            # One byte more than allowed tells "too long" from "just fits".
            body, problem = _read(file, _MAX_SIDECAR_BYTES + 1), ""
        except _ArchiveBroken:
            self._apart["cut off"] += 1
            raise
        if len(body) > _MAX_SIDECAR_BYTES:
            body, problem = b"", f"sidecar above {_MAX_SIDECAR_BYTES} bytes"
        self._add_other(Member(name, "sidecar", "", body, problem), samples)

    def _take_file(self, name: str, ending: str, file: IO[bytes], samples: ArchiveSamples) -> None:
        try:
            head = _read(file, PROBE_BYTES)
            # Neither name nor bytes say picture: it is not a loss that somebody has to look into.
            if ending not in _PICTURES and image_extension(head) is None:
                self._note("unread", ending)
                self._add_other(Member(name, "other"), samples)
                return
            result = _store(head, file, self._folder, self._settings)
        except _ArchiveBroken:
            self._add_image(name, Loss("truncated", "the archive ends within it"), samples)
            raise
        if isinstance(result, Loss) and result.cause == "wrong_content" and ending not in _READ:
            self._note("unknown image type", ending)
            result = Loss("wrong_content", f"unknown image type .{ending}: {result.detail}")
        self._add_image(name, result, samples)

    def _note(self, what: str, ending: str) -> None:
        name = f"{what} .{storable(ending)}" if ending else f"{what}, no ending"
        if len(self._notes) >= _NOTED_ENDINGS and name not in self._notes:
            name = f"{what}, other endings"
        self._notes[name] += 1

    def _add_image(self, name: str, result: Stored | Loss, samples: ArchiveSamples) -> None:
        key, ending = key_and_ending(name)
        place = f"{self._name}#{key}.{ending}"
        # Archives may hold one name twice, and each is a candidate of its own.
        while samples.has_place(place):
            place += "+"
        self._journal.put((place, Outcome(1, result)))
        samples.add(Member(name, "image", place))

    def _add_other(self, member: Member, samples: ArchiveSamples) -> None:
        self._apart["sidecars" if member.kind == "sidecar" else "others"] += 1
        samples.add(member)


def read_webdataset(
    source: Path, shown: str, folder: Path, journal: DownloadJournal, settings: DownloadSettings
) -> Iterator[SourceItem]:
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
        yield from _Archive(place_of(path, source), folder, journal, settings).items(path)
