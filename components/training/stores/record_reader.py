"""Fixed-size records of many shards straight into one buffer, verified.

Reading is the kernel's one copy and nothing else: `preadv` scatters records that are neighbours on
disk to their places in the batch, shards stay open, a few threads keep the disk's queue filled and
hash each piece while it is still in the processor's cache. No thread outlives its reader.

What lies in the page cache as this process has verified it needs no second hash: the kernel is
asked for exactly those bytes first (`RWF_NOWAIT`), and whatever has to come from the disk is hashed
again.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import xxhash

Verify = Literal["always", "first", "never"]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_THREADS = 4
"""Requests in flight; one per core leaves the queue of a solid-state disk half empty."""
_OPEN_SHARDS = 256
"""Descriptors kept; a corpus of a million has a thousand shards, the usual limit of a process."""
_SHARE_OF_LIMIT = 4
"""At most one of this many files that the process may open is a shard."""
_RUN_BYTES = 8 * 2**20
"""Longest single request, so that neighbours are still shared between the threads."""
_PIECE_BYTES = 2**18
"""Read and hashed at a time: what has just arrived is still in a core's own cache, and the disk
reads ahead meanwhile."""
_RUN_RECORDS = 512
"""Below the kernel's limit of 1,024 buffers per call."""
_FROM_MEMORY: int | None = getattr(os, "RWF_NOWAIT", None)
"""Answers with what is in the page cache and never waits for a disk (Linux)."""


class RecordCorrupt(RuntimeError):
    """A record whose bytes are not the ones that were written."""

    def __init__(self, row: int, shard: str, problem: str) -> None:
        """Of index row `row`; `problem` completes the sentence "shard ... ".

        Args:
            row: in the index.
            shard: file name.
            problem: what is wrong with it.
        """
        super().__init__(f"shard {shard}: {problem}")
        self.row, self.shard, self.problem = row, shard, problem


@dataclass(frozen=True)
class Extents:
    """Where records lie; arrays of one length, one entry per index row."""

    shards: tuple[str, ...]
    """File names."""
    shard: npt.NDArray[np.int64]
    """Number in `shards`."""
    offset: npt.NDArray[np.int64]
    """Of the first byte."""
    nbytes: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint64]
    """xxh64 of the record."""

    @classmethod
    def of(cls, index: pd.DataFrame) -> Extents:
        """From columns shard, offset, nbytes and xxh64 (hexadecimal) of an index."""
        # Names are kept once and numbered: a million rows name about a thousand shards.
        names, numbers = np.unique(index["shard"].to_numpy(dtype=np.str_), return_inverse=True)
        return cls(
            tuple(str(name) for name in names),
            numbers.astype(np.int64),
            index["offset"].to_numpy(dtype=np.int64),
            index["nbytes"].to_numpy(dtype=np.int64),
            # As integers of 64 bits, to compare with `intdigest` without spelling each hash out.
            np.array([int(text, 16) for text in index["xxh64"]], dtype=np.uint64),
        )


@dataclass(frozen=True)
class _Run:
    """Records that are neighbours on disk, in the order of their offsets."""

    fd: int
    shard: str
    offset: int
    rows: list[int]
    places: list[int]


def shards_kept_open() -> int:
    """How many shards a reader of this process keeps open at most, at least 1."""
    # A process may be allowed fewer than usual, and it has pipes, logs and libraries besides.
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _OPEN_SHARDS
    return max(1, min(_OPEN_SHARDS, allowed // _SHARE_OF_LIMIT))


class RecordReader:
    """Random access to the records of one store folder; safe to share between threads."""

    def __init__(
        self,
        folder: Path,
        extents: Extents,
        *,
        verify: Verify = "always",
        threads: int = _THREADS,
    ) -> None:
        """Open nothing yet.

        Args:
            folder: holds the shards.
            extents: of all records.
            verify: compare hashes on every read (`always`), not at all (`never`), or (`first`) on
                a record's first read and on each later one that the page cache does not answer, or
                whose shard was changed since.
            threads: requests in flight; 1 reads in the calling thread.
        """
        self._folder, self._extents, self._verify = folder, extents, verify
        # Only "first" asks it: one byte per record, and a lost entry costs one more check.
        self._checked = np.zeros(len(extents.offset), dtype=np.bool_)
        self._seen: dict[int, tuple[int, ...]] = {}
        self._open: OrderedDict[int, int] = OrderedDict()
        self._kept = shards_kept_open()
        self._lock = threading.Lock()
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0

    def close(self) -> None:
        """Give back descriptors and threads; reading opens them again, but single-threaded."""
        with self._lock:
            if self._pool is not None and self._pool_process == os.getpid():
                self._pool.shutdown()
            self._pool, self._threads = None, 1
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Descriptors do not outlive the reader (at exit, modules may be gone before it)."""
        # A failed `__init__` leaves no `_open`; `close` is an argument, bound while `os` still
        # exists.
        while getattr(self, "_open", None):
            close(self._open.popitem()[1])

    def read_into(self, rows: Sequence[int], buffer: Bytes) -> None:
        """Fill `buffer[i]` with the record of index row `rows[i]`.

        Args:
            rows: B index rows; repeats are read again.
            buffer: (B, bytes of a record), C-contiguous.

        Raises:
            RecordCorrupt: a record is cut off, its shard is missing, or its hash differs.
            ValueError: the buffer does not fit the records.
        """
        # Checked before the first read: afterwards the buffer would hold part of the records.
        sizes = self._extents.nbytes[list(rows)]
        if buffer.shape != (len(rows), int(sizes[0]) if len(rows) else buffer.shape[-1]) or (
            len(rows) and bool((sizes != sizes[0]).any())
        ):
            raise ValueError(
                f"a buffer of shape {buffer.shape} does not take {len(rows)} records of "
                f"{sorted(set(sizes.tolist()))} bytes"
            )
        chosen = np.asarray(rows, dtype=np.int64)
        # In disk order, so that neighbours become one request.
        order = np.lexsort((self._extents.offset[chosen], self._extents.shard[chosen]))
        # Held while reading: an open shard must not be closed under another thread's request.
        with self._lock:
            for places in self._parts(chosen, order):
                self._read_places(chosen, places, buffer)

    def _parts(self, chosen: Integers, order: Integers) -> list[Integers]:
        """Places in disk order, cut so that no part needs more shards than may be open."""
        shards = self._extents.shard[chosen[order]]
        # How many shards stand before each place, counted from 0.
        earlier = np.cumsum(np.diff(shards, prepend=shards[:1]) != 0)
        part = earlier // self._kept
        return np.split(order, np.flatnonzero(np.diff(part)) + 1)

    def _read_places(self, chosen: Integers, places: Integers, buffer: Bytes) -> None:
        runs = self._runs(chosen, places)
        if self._threads < 2 or len(runs) < 2:
            for run in runs:
                self._read_run(run, buffer)
            return
        # A forked child has the executor, but none of its threads: requests would wait for ever.
        if self._pool is None or self._pool_process != os.getpid():
            self._pool = ThreadPoolExecutor(self._threads, "records")
            self._pool_process = os.getpid()
        requests = [self._pool.submit(self._read_run, run, buffer) for run in runs]
        # All of them, also after an error: none may write once this has returned.
        wait(requests)
        for request in requests:
            request.result()

    def _runs(self, chosen: Integers, places: Integers) -> list[_Run]:
        """Requests that cover the rows at these places, which are in disk order."""
        extents = self._extents
        needed = {int(extents.shard[row]): int(row) for row in chosen[places]}
        # Open ones that are needed become the newest first, so that none of them is closed for
        # another.
        for number in needed.keys() & self._open.keys():
            self._open.move_to_end(number)
        descriptors = {number: self._descriptor(number, row) for number, row in needed.items()}
        if self._verify == "first":
            for number, descriptor in descriptors.items():
                self._doubt_if_changed(number, descriptor)
        runs: list[_Run] = []
        # No record ends there, so the first one always begins a run.
        end = (-1, -1)
        for place in places.tolist():
            row = int(chosen[place])
            number, offset = int(extents.shard[row]), int(extents.offset[row])
            size = int(extents.nbytes[row])
            last = runs[-1] if runs else None
            if (
                last is not None
                # Only where the next record begins exactly at the end: a gap would be read for
                # nothing, and a repeated record has to be read to two places.
                and end == (number, offset)
                and len(last.rows) < _RUN_RECORDS
                and (len(last.rows) + 1) * size <= _RUN_BYTES
            ):
                last.rows.append(row)
                last.places.append(place)
            else:
                shard = extents.shards[number]
                runs.append(_Run(descriptors[number], shard, offset, [row], [place]))
            end = (number, offset + size)
        return runs

    def _doubt_if_changed(self, number: int, descriptor: int) -> None:
        """Verify all of a shard anew that is not the file it was when it was last read."""
        state = os.fstat(descriptor)
        seen = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if self._seen.setdefault(number, seen) != seen:
            self._checked[self._extents.shard == number] = False
            self._seen[number] = seen

    def _descriptor(self, number: int, row: int) -> int:
        if number not in self._open:
            # Before another is opened: at no moment are there more than are kept.
            while len(self._open) >= self._kept:
                os.close(self._open.popitem(last=False)[1])
            name = self._extents.shards[number]
            try:
                self._open[number] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            # A missing shard is damage to a store whose index names it, and is said in the same
            # words.
            except FileNotFoundError:
                raise RecordCorrupt(row, name, "it is missing") from None
        # The least recently used is closed first.
        self._open.move_to_end(number)
        return self._open[number]

    def _read_run(self, run: _Run, buffer: Bytes) -> None:
        # Views: what the kernel writes through them is the batch itself.
        parts = [memoryview(buffer[place]) for place in run.places]
        size = buffer.shape[1]
        done, total = 0, size * len(parts)
        is_hashed = self._verify != "never"
        is_known = self._verify == "first" and bool(self._checked[run.rows].all())
        if is_known and _read_from_memory(run, parts) == total:
            return
        # Without hashing there is no cache to stay in, and one request is the least work.
        piece = _PIECE_BYTES if is_hashed else total
        digest = xxhash.xxh64()
        while done < total:
            # A request may be answered in part: at a signal, or beyond 2 GiB.
            # Straight into the tensor that training uses: no copy in between.
            got = os.preadv(run.fd, _next_parts(parts, size, done, piece), run.offset + done)
            # End of file: a loop that only waits for `total` would never end here.
            if got == 0:
                raise RecordCorrupt(
                    run.rows[done // size],
                    run.shard,
                    f"it ends at byte {run.offset + done}, within the record",
                )
            arrived = _next_parts(parts, size, done, got) if is_hashed else ()
            for view in arrived:
                row = run.rows[done // size]
                digest.update(view)
                done += len(view)
                # A record is complete; a piece never spans two hashes, since views end with their
                # record.
                if done % size == 0:
                    self._check(row, run.shard, digest)
                    digest.reset()
            if not is_hashed:
                done += got

    def _check(self, row: int, shard: str, digest: xxhash.xxh64) -> None:
        """Compare the hash of a record that has arrived."""
        expected = int(self._extents.digest[row])
        if digest.intdigest() != expected:
            start = int(self._extents.offset[row])
            raise RecordCorrupt(
                row,
                shard,
                f"bytes {start} to {start + int(self._extents.nbytes[row])} do not have hash "
                f"{expected:016x}",
            )
        self._checked[row] = True


def _read_from_memory(run: _Run, parts: list[memoryview]) -> int:
    """Bytes of the run that the page cache answered with; 0 where nobody can say."""
    if _FROM_MEMORY is None:
        return 0
    try:
        return os.preadv(run.fd, parts, run.offset, _FROM_MEMORY)
    # EAGAIN: not in memory. Network and user-space file systems refuse the flag.
    except OSError:
        return 0


def _next_parts(parts: Sequence[memoryview], size: int, start: int, count: int) -> list[memoryview]:
    """Bytes `start` to `start + count` (or the end) of records of `size` bytes laid end to end."""
    found = []
    while count > 0 and start < size * len(parts):
        number, within = divmod(start, size)
        view = parts[number][within : within + count]
        found.append(view)
        start, count = start + len(view), count - len(view)
    return found
