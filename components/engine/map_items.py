"""One function over many untrusted items: timeouts, retries, quarantine, resume.

Every item runs in a worker process, of this machine or of a Ray cluster, so that a decoder that
crashes, hangs or eats memory costs one item: its row says so and the rest goes on. Finished rows
are kept in small Parquet shards, each written aside and renamed; a run that was killed repeats only
what had not reached a shard, or, for costly functions, a journal of single rows. Rows come out in
the order of the items, whatever the number of workers and wherever they run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.engine.ordered_pool import EngineLimits, Failure, OrderedPool
from components.engine.shard_journal import ShardJournal
from components.engine.worker_pool import WorkerPool
from components.files.parquet_files import write_parquet, write_row_groups
from components.files.whole_files import write_text
from components.telemetry.progress import track
from components.telemetry.rates import Throughput

__all__ = ["EngineLimits", "ItemsFailed", "code_digest", "join_shards", "map_items", "open_pool"]

MAX_SHARD_ROWS = 512
_MIN_SHARDS = 16
"""A small corpus is cut into this many shards, so that a kill never costs more than a sixteenth."""

FAILED_FILE = "failed.jsonl"
_GIVE_UP_AFTER = 3
"""Items in one run that fail for a reason outside them; the others would fail alike."""

Row = dict[str, Any]
Function = Callable[[Any], Row]


class ItemsFailed(RuntimeError):
    """Items failed for a reason outside them, such as a server that went away; one line.

    What had finished is kept, the reasons are in `FAILED_FILE`, and another run repeats the rest.
    """


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
    # Sorted keys: the order in which settings were read is no other run.
    text = json.dumps([stage, dict(key), list(ids)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _row(stage: str, schema: pa.Schema, image_id: str, result: Row | Failure) -> Row:
    """The finished row of one item."""
    if isinstance(result, Failure):
        return {"image_id": image_id, "error": f"quarantined: {result.message}"}
    # pyarrow drops keys that its schema lacks, without a word.
    unknown = sorted(set(result) - set(schema.names))
    if unknown:
        raise ValueError(f"{stage}: row keys {unknown} are not in the schema")
    return {**result, "image_id": image_id}


def _is_outside(failure: Failure, reasons: Sequence[type[Exception]]) -> bool:
    return any(failure.is_a(reason) for reason in reasons)


def _raise_failed(failed: Mapping[str, str], state_dir: Path, kept: int, total: int) -> None:
    lines = [json.dumps({"image_id": name, "error": text}) for name, text in failed.items()]
    write_text(state_dir / FAILED_FILE, "\n".join(lines) + "\n")
    # Without the class's name, which says nothing to who reads one line.
    _, _, first = next(iter(failed.values())).partition(": ")
    raise ItemsFailed(
        f"{len(failed)} of {total} items failed ({first}); {kept} finished ones are kept, run the "
        "stage again for the rest"
    )


def open_pool(function: Callable[[Any], Any], limits: EngineLimits) -> OrderedPool:
    """Workers where `limits` wants them; for results that do not fit rows, such as latents."""
    if limits.ray is None:
        return WorkerPool(function, limits)
    from components.engine.ray_pool import RayPool

    return RayPool(function, limits, limits.ray)


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
    keep_items: bool = False,
    outside: Sequence[type[Exception]] = (),
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
        limits: workers, time, memory, retries, and whether they are actors of Ray.
        keep_items: rows are JSON-able and each is kept as soon as it is there.
        outside: exceptions of `function` that say nothing about the item: no row is made of them,
            and after three the run ends.

    Returns:
        shard files in order; together one row per id.

    Raises:
        ValueError: a row holds a key that the schema does not know, or Ray cannot be used.
        WorkersDoNotStart: workers die before they take an item.
        ItemsFailed: one of `outside` was raised.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    # Of an earlier run: what failed then may pass now.
    (state_dir / FAILED_FILE).unlink(missing_ok=True)
    size = _shard_rows(len(ids))
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    shards = [state_dir / f"{stage}-{_fingerprint(stage, key, chunk)}.parquet" for chunk in chunks]
    pending = [index for index, shard in enumerate(shards) if not shard.exists()]
    # No worker starts for a finished corpus: spawning and loading cost seconds to minutes.
    if not pending:
        return shards
    # A shard's name is the fingerprint of its ids, settings and code, so a shard or journal that is
    # there was made of exactly these: nothing inside has to be compared.
    journals = {index: ShardJournal(shards[index]) for index in pending}
    known = {index: journal.read() for index, journal in journals.items()}
    places: dict[int, tuple[int, int]] = {}

    def todo() -> Iterator[Any]:
        given = 0
        for number, payload in enumerate(payloads):
            index, place = divmod(number, size)
            # Payloads of finished items are read past, never sent: order and count stay those of
            # `ids`.
            if index in known and place not in known[index]:
                places[given] = (index, place)
                given += 1
                yield payload

    kept = len(ids) - sum(len(chunks[index]) - len(known[index]) for index in pending)
    at_start = kept
    failed: dict[str, str] = {}

    def keep(given: int, result: Any) -> None:
        nonlocal kept
        index, place = places.pop(given)
        # A failure is not kept: the next run gives the item all its attempts again.
        if keep_items and not isinstance(result, Failure):
            journals[index].add(place, result)
            kept += 1

    # `keep` runs as results arrive, the loop below in their order: the journal must not wait for
    # it.
    results = open_pool(function, limits).map(todo(), keep)
    throughput = Throughput(pending=len(ids) - at_start)
    tracked = track(results, stage, total=len(ids), initial=at_start, note=throughput.note)
    # Closing stops the workers at once when this function leaves early.
    with closing(results):
        for index in pending:
            rows = []
            for place, image_id in enumerate(chunks[index]):
                done = known[index].get(place)
                result = done if done is not None else next(tracked)
                if isinstance(result, Failure) and _is_outside(result, outside):
                    failed[image_id] = result.message
                    if len(failed) == _GIVE_UP_AFTER:
                        _raise_failed(failed, state_dir, kept, len(ids))
                rows.append(_row(stage, schema, image_id, result))
                if done is None:
                    throughput.see(rows[-1])
            # A shard is written whole or not at all: one row that is missing for a reason outside
            # it would be taken for a verdict on the picture by the next run.
            if not failed.keys() & set(chunks[index]):
                write_parquet(pa.Table.from_pylist(rows, schema=schema), shards[index])
                journals[index].remove()
                # Where rows are kept one by one they were counted as they came.
                kept += 0 if keep_items else len(rows) - len(known[index])
        # Past the last item, so that the bar and the workers finish properly.
        assert next(tracked, None) is None
    if failed:
        _raise_failed(failed, state_dir, kept, len(ids))
    return shards


def join_shards(shards: Sequence[Path], schema: pa.Schema, path: Path) -> None:
    """Concatenate columns `schema` of the shards into one file, a row group per shard.

    One shard is in memory at a time. The bytes depend on rows and their number alone.
    """
    tables = (pq.read_table(shard, columns=schema.names).cast(schema) for shard in shards)
    write_row_groups(tables, schema, path)
