"""Worker processes for functions that may crash, hang or eat memory, one item each.

Every worker has a pipe of its own and at most one item, so the parent always knows which item a
dead worker had. (Pools with a shared queue do not: pebble reads "who has what" from the same pipe
as the results, and a worker that dies at once can take the whole pool with it.)

Workers are started with "spawn": a fresh interpreter inherits no threads, locks or accelerator
contexts from a parent that may be training or serving, and its memory at start is its own, which
makes the headroom limit mean something. It costs about half a second per worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from components.settings import Settings

_START_ATTEMPTS = 3
# The C library returns freed image buffers to the kernel, which then clears the same pages for the
# next image: much of a 4K decode. Read once, when a process starts.
_MALLOC_KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class EngineLimits:
    """What one item may cost; none of it changes a result."""

    workers: int
    timeout_s: float
    memory_mb: int
    """MiB of address space above what a worker holds when it is ready."""
    retries: int
    """Further attempts after a crash, a timeout or an exception."""

    @classmethod
    def of(cls, settings: Settings) -> EngineLimits:
        """The limits that the settings name."""
        return cls(
            workers=settings.runtime.workers,
            timeout_s=settings.signals.timeout_s,
            memory_mb=settings.signals.memory_mb,
            retries=settings.signals.retries,
        )


@dataclass(frozen=True)
class Failure:
    """Why an item has no result; no addresses, process ids or times, so it is reproducible."""

    message: str


class WorkersDoNotStart(RuntimeError):
    """Worker processes die before they take an item (an import error, most likely)."""


def _exit_with_parent() -> None:
    """End this process when its parent is gone, even while an item hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _environment_for_workers() -> Generator[None, None, None]:
    """What a process started inside inherits; what the user has set stays."""
    added = {name: value for name, value in _MALLOC_KEEPS_MEMORY.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _limit_threads() -> None:
    """One thread per worker: the pool is the parallelism."""
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _limit_memory(memory_mb: int) -> None:
    held_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = held_pages * resource.getpagesize() + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _attempt(function: Callable[[Any], Any], payload: Any, memory_mb: int) -> bytes:
    """Pickled result or `Failure`."""
    try:
        return pickle.dumps(function(payload))
    except MemoryError:
        failure = Failure(f"more than {memory_mb} MiB needed")
    except Exception as problem:
        detail = " ".join(str(problem).split())
        failure = Failure(f"{type(problem).__name__}: {detail}".rstrip(": "))
    return pickle.dumps(failure)


def _serve(connection: Connection, pickled_function: bytes, memory_mb: int) -> None:
    """Body of a worker: items in, results out, until the parent closes the pipe."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _exit_with_parent()
    # Before the function's module, and with it numpy, is imported.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    function = pickle.loads(pickled_function)
    # A function may say what has to be loaded or compiled once, before time and memory are counted.
    getattr(function, "prepare_worker", lambda: None)()
    _limit_threads()
    _limit_memory(memory_mb)
    try:
        connection.send_bytes(pickle.dumps(None))
        while True:
            payload = connection.recv()
            connection.send_bytes(_attempt(function, payload, memory_mb))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@dataclass
class _Item:
    """One payload on its way."""

    index: int
    payload: Any
    attempts_left: int


class _Worker:
    """The parent's view of one process."""

    def __init__(self, pickled_function: bytes, memory_mb: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, pickled_function, memory_mb), daemon=True
        )
        with _environment_for_workers():
            self.process.start()
        theirs.close()
        self.is_ready = False
        self.item: _Item | None = None
        self.timeout_s = self.deadline = float("inf")

    def give(self, item: _Item, timeout_s: float) -> None:
        self.item = item
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        # If it is dead already, `collect` finds out, with its exit status.
        with contextlib.suppress(OSError):
            self.connection.send(item.payload)

    def collect(self) -> Any:
        """What the worker sent; its death or the time limit as `Failure`; else `...`."""
        try:
            if self.connection.poll():
                return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            pass
        else:
            if self.process.is_alive():
                return self._out_of_time() if time.monotonic() >= self.deadline else ...
            # It may have answered between the poll and its end.
            if self.connection.poll():
                return ...
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        if code < 0:
            return Failure(f"worker killed by {signal.Signals(-code).name}")
        return Failure(f"worker exited with status {code}")

    def _out_of_time(self) -> Failure:
        self.stop()
        return Failure(f"no result within {self.timeout_s:g} s")

    def stop(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Let an idle process end by itself."""
        self.connection.close()
        self.process.join(timeout=5)
        self.stop()


class WorkerPool:
    """A fixed number of replaceable workers for one function."""

    def __init__(self, function: Callable[[Any], Any], limits: EngineLimits) -> None:
        """Start nothing yet; `function` is module-level, payloads and results are picklable."""
        self._function = pickle.dumps(function)
        self._limits = limits
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._on_result: Callable[[int, Any], None] = lambda index, result: None

    def map(
        self, payloads: Iterable[Any], on_result: Callable[[int, Any], None] | None = None
    ) -> Generator[Any, None, None]:
        """Results in the order of `payloads`, a `Failure` for an item that keeps failing.

        Payloads are read only as fast as results are taken.

        Args:
            payloads: picklable.
            on_result: called with (number of the payload, result) as soon as a result is there,
                which may be before those of earlier payloads.

        Raises:
            WorkersDoNotStart: three workers in a row died before they were ready.
        """
        if on_result is not None:
            self._on_result = on_result
        source = enumerate(payloads)
        queue: deque[_Item] = deque()
        done: dict[int, Any] = {}
        yielded = read = 0
        exhausted = finished = False
        window = _IN_FLIGHT_PER_WORKER * self._limits.workers
        try:
            while True:
                while not exhausted and read - yielded < window:
                    following = next(source, None)
                    if following is None:
                        exhausted = True
                    else:
                        queue.append(_Item(*following, attempts_left=self._limits.retries + 1))
                        read += 1
                if yielded in done:
                    result = done.pop(yielded)
                    yielded += 1
                    yield result
                elif exhausted and yielded == read:
                    break
                else:
                    self._step(queue, done, open_items=read - yielded - len(done))
            finished = True
        finally:
            # On Ctrl-C or an error whatever is running is dropped.
            for worker in self._workers:
                worker.close() if finished else worker.stop()
            self._workers.clear()

    def _step(self, queue: deque[_Item], done: dict[int, Any], open_items: int) -> None:
        """Keep workers running and busy, then wait for something to happen."""
        while len(self._workers) < min(self._limits.workers, open_items):
            self._workers.append(_Worker(self._function, self._limits.memory_mb))
        for worker in self._workers:
            if worker.is_ready and worker.item is None and queue:
                worker.give(queue.popleft(), self._limits.timeout_s)
        earliest = min(worker.deadline for worker in self._workers)
        events: list[Any] = []
        for worker in self._workers:
            events += [worker.connection, worker.process.sentinel]
        pause = None if earliest == float("inf") else max(0.0, earliest - time.monotonic())
        wait(events, pause)
        for worker in list(self._workers):
            self._settle(worker, queue, done)

    def _settle(self, worker: _Worker, queue: deque[_Item], done: dict[int, Any]) -> None:
        """Take what one worker has to say."""
        answer = worker.collect()
        if answer is ...:
            return
        is_gone = not worker.process.is_alive()
        if not worker.is_ready:
            if is_gone:
                self._failed_starts += 1
                if self._failed_starts >= _START_ATTEMPTS:
                    raise WorkersDoNotStart(f"worker processes do not start: {answer.message}")
            else:
                self._failed_starts = 0
                worker.is_ready = True
        elif worker.item is not None:
            self._finish(worker.item, answer, queue, done)
            worker.item, worker.deadline = None, float("inf")
        if is_gone:
            worker.connection.close()
            self._workers.remove(worker)

    def _finish(self, item: _Item, answer: Any, queue: deque[_Item], done: dict[int, Any]) -> None:
        if isinstance(answer, Failure):
            item.attempts_left -= 1
            if item.attempts_left > 0:
                queue.appendleft(item)
                return
        self._on_result(item.index, answer)
        done[item.index] = answer
