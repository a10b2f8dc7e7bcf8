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
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from components.engine.ordered_pool import (
    EngineLimits,
    Failure,
    Item,
    OrderedPool,
    WorkersDoNotStart,
)

__all__ = ["EngineLimits", "Failure", "WorkerPool", "WorkersDoNotStart"]

# One death at start may be the kernel's memory killer; several in a row are the function's.
_START_ATTEMPTS = 3
# The C library returns freed image buffers to the kernel, which then clears the same pages for the
# next image: much of a 4K decode. Read once, when a process starts.
_MALLOC_KEEPS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Enough that workers stay busy while the item at the front of the order takes several times as
# long as the others; each payload and result in flight costs memory in the parent.
_IN_FLIGHT_PER_WORKER = 4


def _exit_with_parent() -> None:
    """End this process when its parent is gone, even while an item hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    # The parent's sentinel fires however it ended. A daemon flag does not: it takes an orderly
    # exit.
    def watch() -> None:
        wait([parent.sentinel])
        # Not sys.exit, which in a thread would end the thread.
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
        # The environment belongs to the whole process: its other children must not inherit this.
        for name in added:
            os.environ.pop(name, None)


def _limit_threads() -> None:
    """One thread per worker: the pool is the parallelism."""
    # Only what the function has imported: importing a library to limit it would cost its seconds.
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _limit_memory(memory_mb: int) -> None:
    # From what is held now, not from zero: libraries reserve GiB of address space on import.
    held_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = held_pages * resource.getpagesize() + memory_mb * 2**20
    # The soft limit: an allocation fails with MemoryError, which says what happened, before the
    # kernel's killer ends the process and says nothing.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _attempt(function: Callable[[Any], Any], payload: Any, memory_mb: int) -> bytes:
    """Pickled result or `Failure`."""
    try:
        # Pickled inside the try: a result that cannot travel is the item's failure, not the
        # worker's.
        return pickle.dumps(function(payload))
    except MemoryError:
        failure = Failure(f"more than {memory_mb} MiB needed")
    except Exception as problem:
        failure = Failure.of(problem)
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
        # Says "ready": what an item may cost is counted from here.
        connection.send_bytes(pickle.dumps(None))
        while True:
            payload = connection.recv()
            connection.send_bytes(_attempt(function, payload, memory_mb))
    # The parent has closed the pipe: nothing more will come.
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


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
        # Else this process would hold the worker's end open and never see it close.
        theirs.close()
        self.is_ready = False
        # At most one, so that a death has one suspect.
        self.item: Item | None = None
        self.timeout_s = self.deadline = float("inf")

    def give(self, item: Item, timeout_s: float) -> None:
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
        # Reaps it: the exit code is not known before.
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
        # Not terminate: no library that hangs can catch or block this.
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Let an idle process end by itself."""
        # The worker reads the end of the pipe and returns; a library's exit handler may hang.
        self.connection.close()
        self.process.join(timeout=5)
        self.stop()


class WorkerPool(OrderedPool):
    """A fixed number of replaceable worker processes for one function."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        limits: EngineLimits,
        *,
        keep_workers: bool = False,
    ) -> None:
        """Start nothing yet.

        Args:
            function: module-level; payloads and results are picklable.
            limits: workers and what one item may cost.
            keep_workers: workers (and what they have loaded) survive the end of a `map`, until
                `close`.
        """
        super().__init__(limits)
        self._function = pickle.dumps(function)
        self._keep_workers = keep_workers
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def close(self) -> None:
        """Let idle workers end."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _window(self) -> int:
        return _IN_FLIGHT_PER_WORKER * self._limits.workers

    def _end(self, finished: bool) -> None:
        if finished and self._keep_workers:
            return
        if not finished:
            for worker in self._workers:
                worker.stop()
        self.close()

    def _step(self, queue: deque[Item], done: dict[int, Any], open_items: int) -> None:
        """Keep workers running and busy, then wait for something to happen."""
        for worker in list(self._workers):
            if worker.is_ready and worker.item is None and not worker.process.is_alive():
                # It died idle (the kernel's memory killer, say): no item is to blame.
                worker.connection.close()
                self._workers.remove(worker)
        # Replaces the dead too; for the last few items no worker starts that would find nothing to
        # do.
        while len(self._workers) < min(self._limits.workers, open_items):
            self._workers.append(_Worker(self._function, self._limits.memory_mb))
        for worker in self._workers:
            if worker.is_ready and worker.item is None and queue:
                worker.give(queue.popleft(), self._limits.timeout_s)
        # One wait for answers, deaths and the next deadline: nothing here polls.
        earliest = min(worker.deadline for worker in self._workers)
        events: list[Any] = []
        for worker in self._workers:
            # The sentinel as well: a child of the worker may hold its end of the pipe open after
            # its death.
            events += [worker.connection, worker.process.sentinel]
        pause = None if earliest == float("inf") else max(0.0, earliest - time.monotonic())
        wait(events, pause)
        for worker in list(self._workers):
            self._settle(worker, queue, done)

    def _settle(self, worker: _Worker, queue: deque[Item], done: dict[int, Any]) -> None:
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
