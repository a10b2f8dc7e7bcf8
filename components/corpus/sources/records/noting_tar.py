"""Tar archives read to their end, with a note of what the standard reader passes over in silence.

Python's `tarfile` takes the first damaged header for the end of an archive, and so the end mark of
the first of two archives that were put together. Here reading goes on at the next whole header, and
`NotingTar.shortfall` says what lay between.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

# Python's names for an all-zero block and for a header whose checksum is wrong.
_EndMark: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_Damaged: type[Exception] = tarfile.InvalidHeaderError  # type: ignore[attr-defined]


class _NotingInfo(tarfile.TarInfo):
    """A header that tells its archive about every block that is none."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _NotingInfo:
        archive = cast("NotingTar", tarfile)
        try:
            info = super().fromtarfile(archive)
        except _EndMark:
            archive.is_ended = True
            raise
        except _Damaged:
            archive.note_damage()
            raise
        # A header after an end mark: the file goes on, so that mark was not its end.
        archive.is_ended = False
        return info


class NotingTar(tarfile.TarFile):
    """A stream of members, compressed or not; none is kept in memory once it has been given."""

    tarinfo = _NotingInfo
    is_ended = False
    damaged_blocks = 0

    @classmethod
    def of(cls, path: Path) -> NotingTar:
        """Open an archive.

        Raises:
            tarfile.TarError, OSError, EOFError, zlib.error: it is none, or ends early.
        """
        # A stream reads archives of any size once. Zero blocks are skipped, or the first of several
        # archives in one file would end it.
        return cls.open(path, mode="r|*", ignore_zeros=True)

    def in_order(self) -> Iterator[tarfile.TarInfo]:
        """Every member whose header is whole; to be read before the next is asked for."""
        # Not called `stream`, as an attribute of every TarFile since Python 3.13 is.
        while (member := self.next()) is not None:
            yield member
            # `tarfile` keeps every header it has met: a million members would be a gigabyte.
            self.members: list[Any] = []

    def note_damage(self) -> None:
        """Count a block that is no header; the first of a file says that it is no archive."""
        # Otherwise any file would be "an archive with damaged blocks only".
        if self.offset == 0:
            raise tarfile.ReadError("not a tar archive")
        self.damaged_blocks += 1
        self.is_ended = False

    @property
    def shortfall(self) -> str | None:
        """After the last member: what may be missing; None if the archive is whole."""
        if self.damaged_blocks:
            return f"{self.damaged_blocks} damaged blocks of 512 bytes where members should be"
        return None if self.is_ended else "no end mark, as if the rest were cut off"
