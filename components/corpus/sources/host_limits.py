"""Politeness towards photo hosts: a token bucket for each, and pauses that a host asks for.

The queue never lets one slow host hold up the others.

Times are seconds of any monotonic clock, given by the caller.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
_LONGEST_SLEEP_S = 60.0


@dataclass
class TokenBuckets:
    """One bucket per host: `rate` requests per second, bursts of up to one second's worth.

    Kept as the theoretical arrival time of the next request (generic cell rate algorithm), so a
    host costs one number and no timer.
    """

    rate: float
    """Requests per second and host."""
    _arrival: dict[str, float] = field(default_factory=dict)
    _paused_until: dict[str, float] = field(default_factory=dict)

    @property
    def burst(self) -> int:
        """Requests that an idle host may get at once."""
        return max(1, math.floor(self.rate))

    def ready_at(self, host: str, now: float) -> float:
        """When the next request to `host` may start; `now` or earlier means at once."""
        # A host that has been idle may be ahead of its rate by what a full bucket holds, no more.
        slack = (self.burst - 1) / self.rate
        return max(self._arrival.get(host, now) - slack, self._paused_until.get(host, now))

    def reserve(self, host: str, now: float) -> float:
        """Take one token; returns how long to wait before the request."""
        start = max(now, self.ready_at(host, now))
        # From the later of the two: an idle hour does not save up an hour of tokens.
        self._arrival[host] = max(self._arrival.get(host, start), start) + 1.0 / self.rate
        return start - now

    def pause(self, host: str, until: float) -> None:
        """No request to `host` before `until` (429 or 503 with Retry-After)."""
        # Connections that were open already bring older, shorter pauses.
        self._paused_until[host] = max(until, self._paused_until.get(host, until))


class HostQueue(Generic[T]):
    """Work sorted by host: hosts take turns, each has a limited number of items in progress.

    `take` and `done` come in pairs; between them the item counts as in progress. An item that must
    be tried again goes back with `postpone` in place of `done`.

    Args:
        items: (host, item) in source order; order within a host stays.
        per_host: items of one host in progress at a time.
        buckets: hosts that may not be asked yet are passed over.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        items: Iterable[tuple[str, T]],
        per_host: int,
        buckets: TokenBuckets,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._per_host = per_host
        self._buckets = buckets
        self._clock = clock
        self._active: Counter[str] = Counter()
        self._postponed: list[tuple[float, int, str, T]] = []
        # Breaks ties in the heap, whose items need not be comparable.
        self._ticket = itertools.count()
        self._changed = asyncio.Event()
        self._first_in_line = asyncio.Lock()
        self._open = 0
        for host, item in items:
            self._waiting.setdefault(host, deque()).append(item)
            self._open += 1
        self._turns = deque(self._waiting)

    async def take(self) -> tuple[str, T] | None:
        """The next item that may start now; waits for one; None when all are done."""
        # One waits for the queue and the others for that one: were all to wait for it, each item
        # that is done would wake them all.
        async with self._first_in_line:
            return await self._take()

    async def _take(self) -> tuple[str, T] | None:
        while self._open:
            now = self._clock()
            while self._postponed and self._postponed[0][0] <= now:
                _, _, host, item = heapq.heappop(self._postponed)
                self._enqueue(host, item)
            wake = self._postponed[0][0] if self._postponed else now + _LONGEST_SLEEP_S
            # One round over the hosts, which goes on where the last call ended: a million addresses
            # of one host do not stand before the only one of another.
            for _ in range(len(self._turns)):
                host = self._turns[0]
                self._turns.rotate(-1)
                if self._active[host] >= self._per_host:
                    continue
                ready = self._buckets.ready_at(host, now)
                if ready > now:
                    wake = min(wake, ready)
                    continue
                return host, self._start(host)
            # Nothing may start now; an item that comes back before the wait begins leaves the event
            # set.
            self._changed.clear()
            try:
                # Rounding may leave a wait that is too short to pass: then this loop would spin.
                await asyncio.wait_for(self._changed.wait(), max(wake - now, 0.001))
            except TimeoutError:
                continue
        return None

    def done(self, host: str) -> None:
        """The item taken from `host` has an outcome."""
        self._open -= 1
        self._leave(host)

    def postpone(self, host: str, item: T, wait_s: float) -> None:
        """The item taken from `host` has to be taken again, not before `wait_s` from now."""
        due = self._clock() + wait_s
        heapq.heappush(self._postponed, (due, next(self._ticket), host, item))
        self._leave(host)

    def _enqueue(self, host: str, item: T) -> None:
        if host not in self._waiting:
            self._waiting[host] = deque()
            self._turns.append(host)
        self._waiting[host].append(item)

    def _start(self, host: str) -> T:
        item = self._waiting[host].popleft()
        if not self._waiting[host]:
            # Only hosts with waiting items stay in the round; `take` moved this one to its end.
            del self._waiting[host]
            self._turns.pop()
        self._active[host] += 1
        return item

    def _leave(self, host: str) -> None:
        self._active[host] -= 1
        if not self._active[host]:
            del self._active[host]
        self._changed.set()
