"""Record reader: the bytes of a plain read, whatever the order, threads or neighbours."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable
from errno import EAGAIN, EOPNOTSUPP
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from components.training.stores import record_reader
from components.training.stores.record_reader import (
    Extents,
    RecordCorrupt,
    RecordReader,
    Verify,
    shards_kept_open,
)

SIZE, PER_SHARD, SHARDS = 40, 7, 4


def record(row: int) -> bytes:
    return np.random.default_rng(row).bytes(SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        rows = range(number * PER_SHARD, (number + 1) * PER_SHARD)
        (root / f"s-{number}.bin").write_bytes(b"".join(map(record, rows)))
    return root


def extents() -> Extents:
    rows = range(SHARDS * PER_SHARD)
    columns = {
        "shard": [f"s-{row // PER_SHARD}.bin" for row in rows],
        "offset": [row % PER_SHARD * SIZE for row in rows],
        "nbytes": [SIZE] * len(rows),
        "xxh64": [xxhash.xxh64_hexdigest(record(row)) for row in rows],
    }
    return Extents.of(pd.DataFrame(columns))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.integers(0, SHARDS * PER_SHARD - 1), min_size=1, max_size=40),
    threads=st.sampled_from([1, 3]),
)
def test_any_rows_in_any_order_with_repeats_are_those_written(
    folder: Path, rows: list[int], threads: int
) -> None:
    reader = RecordReader(folder, extents(), threads=threads)
    buffer = np.zeros((len(rows), SIZE), dtype=np.uint8)
    reader.read_into(rows, buffer)
    reader.close()
    assert [bytes(row) for row in buffer] == [record(row) for row in rows]


@pytest.mark.parametrize("piece_bytes", [1, 7, SIZE, 3 * SIZE + 5])
@pytest.mark.parametrize("verify", ["always", "first"])
def test_records_are_hashed_piece_by_piece(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, verify: Verify
) -> None:
    monkeypatch.setattr(record_reader, "_PIECE_BYTES", piece_bytes)
    rows = [1, 2, 3, 4, 5, 20, 21]
    buffer = np.empty((len(rows), SIZE), dtype=np.uint8)
    reader = RecordReader(folder, extents(), verify=verify)
    for _ in range(2):
        buffer[:] = 0
        reader.read_into(rows, buffer)
        assert [bytes(row) for row in buffer] == [record(row) for row in rows]
    broken = RecordReader(spoiled(folder, tmp_path), extents(), verify=verify)
    with pytest.raises(RecordCorrupt, match=r"s-1\.bin: bytes 80 to 120"):
        broken.read_into([8, 9, 10], np.empty((3, SIZE), dtype=np.uint8))


def test_neighbours_on_disk_are_one_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        requests.append((len(buffers), offset))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    reader = RecordReader(folder, extents(), threads=1)
    reader.read_into([3, 9, 2, 4, 8], np.empty((5, SIZE), dtype=np.uint8))
    assert sorted(requests) == [(2, SIZE), (3, 2 * SIZE)]


def test_requests_that_are_answered_in_part_are_continued(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def grudging(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:13]], offset)

    monkeypatch.setattr(os, "preadv", grudging)
    buffer = np.empty((3, SIZE), dtype=np.uint8)
    RecordReader(folder, extents()).read_into([5, 4, 6], buffer)
    assert [bytes(row) for row in buffer] == [record(5), record(4), record(6)]


def spoiled(folder: Path, tmp_path: Path) -> Path:
    for shard in folder.iterdir():
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    data = bytearray((tmp_path / "s-1.bin").read_bytes())
    data[2 * SIZE] ^= 1
    (tmp_path / "s-1.bin").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("threads", [1, 4])
def test_a_changed_record_is_named_with_its_bytes(
    folder: Path, tmp_path: Path, threads: int
) -> None:
    reader = RecordReader(spoiled(folder, tmp_path), extents(), threads=threads)
    with pytest.raises(RecordCorrupt, match=r"s-1\.bin: bytes 80 to 120") as problem:
        reader.read_into([0, 9, 20], np.empty((3, SIZE), dtype=np.uint8))
    assert problem.value.row == 9


def test_reads_that_are_never_verified_take_what_is_there(folder: Path, tmp_path: Path) -> None:
    buffer = np.empty((1, SIZE), dtype=np.uint8)
    RecordReader(spoiled(folder, tmp_path), extents(), verify="never").read_into([9], buffer)
    assert bytes(buffer[0]) != record(9)


def hashes_in(reading: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many records are hashed while `reading` runs."""
    compared = []
    real = RecordReader._check

    def counted(self: RecordReader, row: int, *arguments: object) -> None:
        compared.append(row)
        real(self, row, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RecordReader, "_check", counted)
        reading()
    return len(compared)


def test_records_in_memory_are_hashed_on_their_first_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = np.empty((3, SIZE), dtype=np.uint8)
    first = RecordReader(folder, extents(), verify="first")
    always = RecordReader(folder, extents())
    for rows, needed in (([1, 2, 20], 3), ([20, 2, 1], 0), ([1, 2, 3], 3)):
        assert hashes_in(lambda rows=rows: first.read_into(rows, buffer), monkeypatch) == needed
        assert [bytes(row) for row in buffer] == [record(row) for row in rows]
        assert hashes_in(lambda rows=rows: always.read_into(rows, buffer), monkeypatch) == 3


@pytest.mark.parametrize("reason", ["not in memory", "refused", "half of it", "no such flag"])
def test_records_that_memory_does_not_answer_are_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    buffer = np.empty((2, SIZE), dtype=np.uint8)
    first = RecordReader(folder, extents(), verify="first")
    first.read_into([1, 2], buffer)
    real = os.preadv

    def from_disk(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags and reason == "half of it":
            return real(fd, buffers[:1], offset)
        if flags:
            raise OSError(EAGAIN if reason == "not in memory" else EOPNOTSUPP, reason)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", from_disk)
    if reason == "no such flag":
        monkeypatch.setattr(record_reader, "_FROM_MEMORY", None)
    buffer[:] = 0
    assert hashes_in(lambda: first.read_into([1, 2], buffer), monkeypatch) == 2
    assert [bytes(row) for row in buffer] == [record(1), record(2)]


@pytest.mark.parametrize("with_times", [False, True])
def test_a_shard_that_was_changed_is_verified_again(
    folder: Path, tmp_path: Path, with_times: bool
) -> None:
    root = spoiled(folder, tmp_path)
    buffer = np.empty((1, SIZE), dtype=np.uint8)
    first = RecordReader(root, extents(), verify="first")
    for row in (0, 8):
        first.read_into([row], buffer)
    state = (root / "s-1.bin").stat()
    with (root / "s-1.bin").open("r+b") as file:
        file.seek(SIZE)
        file.write(bytes(SIZE))
    if with_times:
        os.utime(root / "s-1.bin", ns=(state.st_atime_ns, state.st_mtime_ns))
    first.read_into([0], buffer)
    with pytest.raises(RecordCorrupt, match=r"s-1\.bin: bytes 40 to 80"):
        first.read_into([8], buffer)


def test_threads_share_a_reader(folder: Path) -> None:
    reader = RecordReader(folder, extents())
    wrong: list[int] = []

    def work(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, SHARDS * PER_SHARD, 20).tolist()
        buffer = np.empty((len(rows), SIZE), dtype=np.uint8)
        reader.read_into(rows, buffer)
        wrong.extend(r for r, got in zip(rows, buffer, strict=True) if bytes(got) != record(r))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_shards_are_open_than_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(record_reader, "_OPEN_SHARDS", 2)
    most, real = 0, os.preadv

    def shards_open() -> int:
        found = 0
        for number in os.listdir("/proc/self/fd"):
            # Other threads close theirs meanwhile.
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{number}").endswith(".bin")
        return found

    def counted(*arguments: object) -> int:
        nonlocal most
        most = max(most, shards_open())
        return real(*arguments)  # type: ignore[arg-type]

    # Readers of other tests that nobody has collected yet.
    gc.collect()
    before = shards_open()
    monkeypatch.setattr(os, "preadv", counted)
    reader = RecordReader(folder, extents(), threads=threads)
    for rows in ([0, 9, 16, 23], [9, 0], [27, 1, 8, 15, 22, 2], []):
        buffer = np.zeros((len(rows), SIZE), dtype=np.uint8)
        reader.read_into(rows, buffer)
        assert [bytes(row) for row in buffer] == [record(row) for row in rows]
    assert most - before == 2
    reader.close()
    assert shards_open() == before


def test_the_limit_of_the_process_bounds_open_shards() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, kept in ((256, 64), (2048, 256)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert shards_kept_open() == kept
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_forked_child_reads_with_threads_of_its_own(folder: Path) -> None:
    reader = RecordReader(folder, extents(), threads=2)
    buffer = np.zeros((2, SIZE), dtype=np.uint8)
    reader.read_into([0, 9], buffer)

    def work() -> None:
        reader.read_into([1, 20], buffer)
        os._exit(0 if [bytes(row) for row in buffer] == [record(1), record(20)] else 1)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    alive = child.is_alive()
    child.kill()
    child.join()
    assert not alive
    assert child.exitcode == 0


def test_a_buffer_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not take 2 records"):
        RecordReader(folder, extents()).read_into([1, 2], np.empty((2, 8), dtype=np.uint8))
