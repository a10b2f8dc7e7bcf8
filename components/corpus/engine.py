"""One function over many untrusted items: timeouts, retries, quarantine, resume.

Every item runs in a worker process, so that a decoder that crashes, hangs or eats memory costs one
item: its row says so and the rest goes on. Finished rows are kept in small Parquet shards, each
written aside and renamed; a run that was killed repeats only what had not reached a shard. Rows
come out in the order of the items, whatever the number of workers.

Workers are started with "spawn": a fresh interpreter inherits no threads, locks or accelerator
contexts from a parent that may be training or serving, and its memory at start is its own, which
makes the headroom limit mean something. It costs about half a second per worker.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pebble import ProcessExpired, ProcessPool

from components.corpus.manifest import write_parquet
from components.progress import track

MAX_SHARD_ROWS = 512
_MIN_SHARDS = 16
"""A small corpus is cut into this many shards, so that a kill never costs more than a sixteenth."""

Row = dict[str, Any]
Function = Callable[[Any], Row]


@dataclass(frozen=True)
class EngineLimits:
    """What one item may cost; none of it changes a result."""

    workers: int
    timeout_s: float
    memory_mb: int
    """MiB of address space above what a worker holds when it is ready."""
    retries: int
    """Further attempts after a crash, a timeout or an exception."""


def code_digest(*modules: ModuleType) -> str:
    """Hash of the modules' source: rows made by other code are not reused."""
    digest = hashlib.sha256()
    for module in modules:
        if module.__file__ is None:
            raise ValueError(f"module {module.__name__} has no source file")
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _shard_rows(items: int) -> int:
    return min(MAX_SHARD_ROWS, max(1, items // _MIN_SHARDS))


def _fingerprint(stage: str, key: Mapping[str, Any], ids: Sequence[str]) -> str:
    text = json.dumps([stage, dict(key), list(ids)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _prepare_worker(memory_mb: int) -> None:
    """Leave Ctrl-C to the parent, one thread per worker, bounded memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import cv2

    cv2.setNumThreads(1)
    held_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = held_pages * resource.getpagesize() + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _failure(problem: BaseException, limits: EngineLimits) -> str:
    """The text of a quarantined row: no addresses, ids or times, so that it is reproducible."""
    if isinstance(problem, FutureTimeoutError):
        return f"quarantined: no result within {limits.timeout_s:g} s"
    if isinstance(problem, ProcessExpired):
        code = problem.exitcode
        if code is not None and code < 0:
            return f"quarantined: worker killed by {signal.Signals(-code).name}"
        return f"quarantined: worker exited with status {code}"
    if isinstance(problem, MemoryError):
        return f"quarantined: more than {limits.memory_mb} MiB needed"
    detail = " ".join(str(problem).split())
    return f"quarantined: {type(problem).__name__}: {detail}".rstrip(": ")


class _Attempts:
    """One scheduled item with its remaining retries."""

    def __init__(
        self, pool: ProcessPool, function: Function, payload: Any, limits: EngineLimits
    ) -> None:
        self._arguments = (pool, function, payload)
        self._limits = limits
        self._future = self._schedule()

    def _schedule(self) -> Any:
        pool, function, payload = self._arguments
        return pool.schedule(function, args=[payload], timeout=self._limits.timeout_s)

    def result(self) -> Row | str:
        """The function's row, or the text of the last failure."""
        for attempt in range(self._limits.retries + 1):
            try:
                return self._future.result()
            except Exception as problem:
                failure = _failure(problem, self._limits)
            if attempt < self._limits.retries:
                self._future = self._schedule()
        return failure


def _results(
    function: Function, payloads: Iterable[Any], limits: EngineLimits
) -> Iterator[Row | str]:
    """Results in the order of `payloads`; a bounded number is in flight."""
    pool = ProcessPool(
        max_workers=limits.workers,
        initializer=_prepare_worker,
        initargs=[limits.memory_mb],
        context=multiprocessing.get_context("spawn"),
    )
    remaining = iter(payloads)
    in_flight: deque[_Attempts] = deque()
    finished = False
    try:
        while True:
            for payload in islice(remaining, 4 * limits.workers - len(in_flight)):
                in_flight.append(_Attempts(pool, function, payload, limits))
            if not in_flight:
                break
            yield in_flight.popleft().result()
        finished = True
    finally:
        # On Ctrl-C or an error the rest is dropped; shards on disk stay.
        if finished:
            pool.close()
        else:
            pool.stop()
        pool.join()


def map_items(
    function: Function,
    ids: Sequence[str],
    payloads: Iterable[Any],
    *,
    stage: str,
    key: Mapping[str, Any],
    schema: pa.Schema,
    state_dir: Path,
    limits: EngineLimits,
) -> list[Path]:
    """Apply `function` to every payload in worker processes and keep the rows in shards.

    Args:
        function: module-level function, payload -> row (keys among the schema's names). It returns
            expected problems as data; what it raises is retried, then quarantined.
        ids: image_id of each payload; stored in column "image_id".
        payloads: as many as `ids`, read lazily and in order.
        stage: name for the progress bar and the fingerprint.
        key: everything but the items that rows depend on (settings, code digest), JSON-able.
        schema: of the rows; has "image_id" and "error" (null where all went well).
        state_dir: where shards live between attempts.
        limits: workers, time, memory, retries.

    Returns:
        shard files in order; together one row per id.

    Raises:
        ValueError: a row holds a key that the schema does not know.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    size = _shard_rows(len(ids))
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    shards = [state_dir / f"{stage}-{_fingerprint(stage, key, chunk)}.parquet" for chunk in chunks]
    pending = [index for index, shard in enumerate(shards) if not shard.exists()]
    if not pending:
        return shards
    wanted = set(pending)
    todo = (payload for row, payload in enumerate(payloads) if row // size in wanted)
    done = len(ids) - sum(len(chunks[index]) for index in pending)
    results = _results(function, todo, limits)
    tracked = track(results, stage, total=len(ids), initial=done)
    for index in pending:
        rows = []
        for image_id, result in zip(chunks[index], tracked, strict=False):
            row = {"error": result} if isinstance(result, str) else result
            unknown = sorted(set(row) - set(schema.names))
            if unknown:
                raise ValueError(f"{stage}: row keys {unknown} are not in the schema")
            rows.append({**row, "image_id": image_id})
        write_parquet(pa.Table.from_pylist(rows, schema=schema), shards[index])
    return shards


def join_shards(shards: Sequence[Path], schema: pa.Schema, path: Path) -> None:
    """Concatenate columns `schema` of the shards into one file, a row group per shard.

    One shard is in memory at a time. The bytes depend on rows and their number alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for shard in shards:
            writer.write_table(pq.read_table(shard, columns=schema.names).cast(schema))
    temporary.replace(path)
