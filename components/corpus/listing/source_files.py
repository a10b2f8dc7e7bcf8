"""What lies under a source, by name: sizes, times, and why something is no file that can be read.

No file is opened here. A pipe, a socket, a device or a link that leads nowhere is told by its stat
alone, so none of them can keep a run waiting.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from components.settings.corpus import IngestSettings

_THREADS = 16
"""Folders and stats asked for at once: what a network file system answers in milliseconds."""
_STATS_AT_ONCE = 2048
_LONGEST_SHOWN = 200
LOOP = "symbolic links in a loop"
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""What archives of macOS, disk stations and file systems put among a person's files."""


class SourceFile(NamedTuple):
    """One entry of a source."""

    name: str
    """Path below the source with slashes; bytes that are not UTF-8 as surrogates."""
    is_candidate: bool
    """A photograph by its ending, or a linked folder; all else lies beside (captions, licences)."""
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    """Of the file that a link leads to; all 0 where there is none."""
    problem: str | None
    """Why it cannot be read; None when it can be tried."""


def source_folder(settings: IngestSettings, root: Path) -> Path:
    """The folder that `ingest.source` names, relative to `root` unless absolute.

    Raises:
        ValueError: it is missing, not a folder, may not be listed, or holds the project itself.
    """
    folder = root / settings.source
    advice = "point ingest.source at a folder of photographs"
    if not folder.exists():
        raise ValueError(f"{settings.source}: no such folder; {advice}")
    if not folder.is_dir():
        raise ValueError(f"{settings.source}: not a folder; {advice}")
    try:
        # `is_dir` is true of a folder that may be entered but not listed.
        os.listdir(folder)
    except PermissionError:
        raise ValueError(
            f"{settings.source}: no permission to list this folder; allow it or {advice}"
        ) from None
    refuse_project(folder, root, settings.source)
    return folder


def refuse_project(folder: Path, root: Path, shown: str) -> None:
    """Refuse a folder in which the pipeline's own pictures would become candidates.

    Raises:
        ValueError: it is, or holds, the project or its data.
    """
    if (root.resolve() / "data").is_relative_to(folder.resolve()):
        raise ValueError(
            f"{shown}: holds the project itself, whose own pictures are no source; put the "
            "photographs in a folder of their own and point ingest.source at it"
        )


def is_of_system(name: str) -> bool:
    """Whether an entry of a folder is no one's photograph or list, and is not looked at.

    Its name begins with a dot (`.git`, `.thumbnails`, `.DS_Store`, `._photo.jpg`), or is one of
    `SYSTEM_FOLDERS`.
    """
    return name.startswith(".") or name in SYSTEM_FOLDERS


def photographs(folder: Path, endings: Container[str], *, recursive: bool = True) -> Iterator[Path]:
    """Files below a folder that a source would take for photographs by name, in no order.

    Args:
        folder: where to look; links to folders are not followed.
        endings: in lower case, with the dot.
        recursive: also in the folders inside.
    """
    for current, folders, files in os.walk(folder):
        # In place: `os.walk` enters what is left in the list.
        folders[:] = [name for name in folders if recursive and not is_of_system(name)]
        for name in files:
            path = Path(current, name)
            if path.suffix.lower() in endings and not is_of_system(name):
                yield path


def printable(name: str) -> str:
    r"""Bytes of a name that are not UTF-8 as \xNN, so that it can be stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_source(settings: IngestSettings, root: Path) -> list[SourceFile]:
    """Everything under `ingest.source` in sorted order; a list or an archive may be one file.

    Linked folders are listed as they are and never entered; what is the system's (`is_of_system`)
    is left out.

    Raises:
        ValueError: no usable source, a folder that may not be listed, or, for a folder of
            photographs, not one of them.
    """
    place = root / settings.source
    if settings.kind != "folder" and place.is_file():
        return [_described(place.name, place, None, place.parent.resolve(), False)]
    if settings.kind != "folder" and not place.exists():
        raise ValueError(
            f"{settings.source}: no such file or folder; point ingest.source at a file or folder"
        )
    folder = source_folder(settings, root)
    # Threads answer in any order; the table's rows have one.
    found = sorted(_walk(folder, settings), key=lambda file: file.name)
    if settings.kind == "folder" and not any(file.is_candidate for file in found):
        raise ValueError(
            f"{settings.source}: no files ending in {', '.join(settings.extensions)}; point "
            "ingest.source at a folder of photographs"
        )
    return found


class _Found(NamedTuple):
    """What one question to the file system brought: entries of a folder, or described files."""

    prefix: str = ""
    entries: Sequence[os.DirEntry[str]] = ()
    files: Sequence[SourceFile] = ()


def _walk(folder: Path, settings: IngestSettings) -> Iterator[SourceFile]:
    """Every entry once, folders and stats side by side."""
    inside = folder.resolve()
    # A folder whose own name is not UTF-8 gives no file a name that could be stored.
    bad_root = printable(str(folder)) != str(folder)
    takes_photographs = settings.kind == "folder"
    enters_folders = settings.recursive or not takes_photographs

    def stats(prefix: str, entries: Sequence[os.DirEntry[str]]) -> _Found:
        return _Found(
            files=[
                _described(
                    prefix + entry.name,
                    Path(entry.path),
                    entry,
                    inside,
                    takes_photographs and _is_candidate(entry, settings),
                    bad_root=bad_root,
                )
                for entry in entries
            ]
        )

    # Answers as they come: waiting for a set of questions would look at all of them each time.
    answers: SimpleQueue[Future[_Found]] = SimpleQueue()
    waiting = 0
    with ThreadPoolExecutor(_THREADS) as pool:

        def ask(question: Callable[..., _Found], *about: object) -> None:
            nonlocal waiting
            waiting += 1
            pool.submit(question, *about).add_done_callback(answers.put)

        ask(_scan, folder, "")
        while waiting:
            answer = answers.get()
            waiting -= 1
            try:
                found = answer.result()
            except OSError as problem:
                # A folder that cannot be listed may hold any number of photographs: to go on would
                # be a corpus that is smaller for no visible reason.
                pool.shutdown(cancel_futures=True)
                raise ValueError(
                    f"{_short(str(problem.filename))}: {problem.strerror}; every folder under "
                    f"ingest.source ({settings.source}) must be readable"
                ) from None
            yield from found.files
            files = []
            for entry in found.entries:
                # Never through links: two links to one folder would double it, a link upwards never
                # end.
                if not _is_folder(entry) or entry.is_symlink():
                    files.append(entry)
                elif enters_folders:
                    ask(_scan, Path(entry.path), f"{found.prefix}{entry.name}/")
            for start in range(0, len(files), _STATS_AT_ONCE):
                ask(stats, found.prefix, files[start : start + _STATS_AT_ONCE])


def _scan(folder: Path, prefix: str) -> _Found:
    with os.scandir(folder) as entries:
        return _Found(prefix, [entry for entry in entries if not is_of_system(entry.name)])


def _short(path: str) -> str:
    """Both ends of a path that is too long for a line, such as one that the system refuses."""
    shown = printable(path)
    if len(shown) <= _LONGEST_SHOWN:
        return shown
    half = _LONGEST_SHOWN // 2
    return f"{shown[:half]}...{shown[-half:]}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; a loop is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_candidate(entry: os.DirEntry[str], settings: IngestSettings) -> bool:
    if entry.is_symlink() and _is_folder(entry):
        return settings.recursive
    stem, dot, ending = entry.name.rpartition(".")
    return bool(stem) and f"{dot}{ending}".lower() in settings.extensions


def _described(
    name: str,
    path: Path,
    entry: os.DirEntry[str] | None,
    inside: Path,
    is_candidate: bool,
    *,
    bad_root: bool = False,
) -> SourceFile:
    """The entry with its stat, or with why there is none.

    Args:
        name: below the source.
        path: where it is.
        entry: as its folder lists it; None for a source that is one file, which may be a link.
        inside: the source with all links followed.
        is_candidate: see `SourceFile`.
        bad_root: the source's own name is not UTF-8.
    """

    def unusable(problem: str) -> SourceFile:
        return SourceFile(name, is_candidate, 0, 0, 0, problem)

    if bad_root or printable(name) != name:
        return unusable("file name is not UTF-8; rename the file")
    try:
        # What is no link lies where it is listed.
        if entry is not None and entry.is_symlink() and not _leads_inside(path, inside):
            return unusable("symbolic link that leaves the source folder; not followed")
        status = path.stat() if entry is None else entry.stat()
    except RuntimeError:
        # Until Python 3.12 `resolve` names a loop by this; from 3.13 on `stat` does, as below.
        return unusable(LOOP)
    except OSError as problem:
        return unusable(
            LOOP if problem.errno == errno.ELOOP else f"cannot read: {problem.strerror}"
        )
    if stat.S_ISDIR(status.st_mode):
        return unusable("linked folder; not followed")
    if not stat.S_ISREG(status.st_mode):
        # Reading a pipe would wait for ever.
        return unusable("not a regular file")
    return SourceFile(
        name, is_candidate, status.st_size, status.st_mtime_ns, status.st_ctime_ns, None
    )


def _leads_inside(path: Path, inside: Path) -> bool:
    return path.resolve().is_relative_to(inside)
