"""What the two worker pools share: limits, failures, and results in the order of the payloads.

`worker_pool` runs processes of this machine, `ray_pool` actors of a Ray cluster; both are
`OrderedPool`s, so whoever maps a function over items does not see which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.settings.schema import Settings


@dataclass(frozen=True)
class RayOptions:
    """Where Ray's actors run (fields of `runtime`); none of it changes a result."""

    address: str | None
    """Of a running cluster; None: an instance of its own on this machine's loopback."""
    actors: int | None
    """None: as many as the cluster has room for."""
    gpus_per_actor: float
    """0 where no network runs on a GPU."""
    local_cpus: int
    """Size of an own instance."""
    batch_items: int = 8
    """Items per message, which divides its few hundred microseconds; a driver that is killed loses
    what its actors have in hand."""


@dataclass(frozen=True)
class EngineLimits:
    """What one item may cost and where it is computed; none of it changes a result."""

    workers: int
    timeout_s: float
    memory_mb: int
    """MiB of address space above what a worker holds when it is ready."""
    retries: int
    """Further attempts after a crash, a timeout or an exception."""
    ray: RayOptions | None = None
    """None: worker processes of this machine."""

    @classmethod
    def of(cls, settings: Settings) -> EngineLimits:
        """The limits that the settings name, for functions of the CPU."""
        runtime = settings.runtime
        options = RayOptions(
            address=runtime.ray_address,
            actors=runtime.actors,
            gpus_per_actor=0.0,
            # Every actor takes one CPU of the instance: fewer would leave actors waiting for ever.
            local_cpus=max(runtime.workers, runtime.actors or 1),
        )
        return cls(
            workers=runtime.workers,
            timeout_s=settings.signals.timeout_s,
            memory_mb=settings.signals.memory_mb,
            retries=settings.signals.retries,
            ray=options if runtime.engine == "ray" else None,
        )

    @classmethod
    def for_networks(cls, settings: Settings, *, timeout_s: float, memory_mb: int) -> EngineLimits:
        """The same for functions that load a network once per worker.

        On a GPU the local engine has one worker, since a network fills a good part of it; Ray gives
        every actor `runtime.gpus_per_actor`.

        Args:
            settings: of the run.
            timeout_s: at least this per item; loading counts against the first.
            memory_mb: at least this; CUDA reserves address space freely.
        """
        limits = cls.of(settings)
        # An item takes long enough to travel alone.
        options = limits.ray and replace(limits.ray, batch_items=1)
        limits = replace(
            limits,
            ray=options,
            timeout_s=max(limits.timeout_s, timeout_s),
            memory_mb=max(limits.memory_mb, memory_mb),
        )
        if settings.runtime.device != "cuda":
            return limits
        options = options and replace(options, gpus_per_actor=settings.runtime.gpus_per_actor)
        return replace(limits, workers=1, ray=options)


@dataclass(frozen=True)
class Failure:
    """Why an item has no result; no addresses, process ids or times, so it is reproducible."""

    message: str
    classes: tuple[str, ...] = ()
    """Full names of the exception's class and of those above it; the exception itself stays in the
    worker, whose modules this process may not have."""

    def is_a(self, kind: type[BaseException]) -> bool:
        """Whether the exception was of a class or of one below it."""
        return _full_name(kind) in self.classes

    @classmethod
    def of(cls, problem: BaseException) -> Failure:
        """What an exception says, on one line."""
        # No traceback: paths and line numbers differ between machines, and rows must not.
        detail = " ".join(str(problem).split())
        message = f"{type(problem).__name__}: {detail}".rstrip(": ")
        # Names travel where classes cannot: unpickling the exception could fail in the parent.
        return cls(message, tuple(map(_full_name, type(problem).__mro__)))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class WorkersDoNotStart(RuntimeError):
    """Workers die before they take an item (an import error, most likely)."""


@dataclass
class Item:
    """One payload on its way."""

    index: int
    payload: Any
    attempts_left: int
    is_suspect: bool = False
    """It was in hand when more than one item was lost at once, and may be the cause."""


class OrderedPool(ABC):
    """Workers of some kind behind one ordered stream of results."""

    def __init__(self, limits: EngineLimits) -> None:
        """Start nothing yet."""
        self._limits = limits
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
            WorkersDoNotStart: workers died again and again before they were ready.
        """
        if on_result is not None:
            self._on_result = on_result
        source = enumerate(payloads)
        queue: deque[Item] = deque()
        # Answers that came before their turn.
        done: dict[int, Any] = {}
        yielded = read = 0
        exhausted = finished = False
        window = self._window()
        try:
            while True:
                # Bounded by what is not yielded, not by what is not done: one slow item at the
                # front must not let a million finished results pile up behind it.
                while not exhausted and read - yielded < window:
                    following = next(source, None)
                    if following is None:
                        exhausted = True
                    else:
                        queue.append(Item(*following, attempts_left=self._limits.retries + 1))
                        read += 1
                if yielded in done:
                    result = done.pop(yielded)
                    # Before the yield: a consumer that stops here has taken this result.
                    yielded += 1
                    yield result
                elif exhausted and yielded == read:
                    break
                else:
                    self._step(queue, done, open_items=read - yielded - len(done))
            # Reached only by running out of payloads; a generator that its consumer closes leaves
            # through `finally` alone.
            finished = True
        finally:
            # On Ctrl-C or an error whatever is running is dropped.
            self._end(finished)

    def _finish(self, item: Item, answer: Any, queue: deque[Item], done: dict[int, Any]) -> None:
        """Keep an answer, or queue the item again while it has attempts left."""
        if isinstance(answer, Failure):
            # Crashes, timeouts and exceptions cost the same: which of them it was may differ from
            # one attempt to the next.
            item.attempts_left -= 1
            if item.attempts_left > 0:
                # In front, since everything behind it waits for its turn in the order.
                queue.appendleft(item)
                return
        self._keep(item, answer, done)

    def _keep(self, item: Item, answer: Any, done: dict[int, Any]) -> None:
        """Take an answer that stands."""
        # At once, not in its turn: a journal wants it on disk before anything can be killed.
        self._on_result(item.index, answer)
        done[item.index] = answer

    @abstractmethod
    def _window(self) -> int:
        """How many items may be read and not yet yielded."""

    @abstractmethod
    def _step(self, queue: deque[Item], done: dict[int, Any], open_items: int) -> None:
        """Keep workers running and busy, then wait for something to happen."""

    @abstractmethod
    def _end(self, finished: bool) -> None:
        """After the last result, or at once when `map` is left early."""
