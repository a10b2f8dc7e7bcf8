from __future__ import annotations

import asyncio
import time

from components.corpus.sources.host_limits import HostQueue, TokenBuckets


def test_in_any_window_a_host_gets_no_more_than_burst_plus_rate() -> None:
    buckets = TokenBuckets(rate=5.0)
    starts = []
    now = 0.0
    for _ in range(200):
        starts.append(now + buckets.reserve("a", now))
        now += 0.03
    for first in range(0, 200, 7):
        for last in range(first, 200, 11):
            window = starts[last] - starts[first]
            assert last - first + 1 <= buckets.burst + 5.0 * window + 1e-6
    assert buckets.reserve("b", now) == 0.0


def test_the_longest_pause_that_a_host_asked_for_holds() -> None:
    buckets = TokenBuckets(rate=5.0)
    buckets.pause("a", 60.0)
    # Of a request that was under way; its answer comes later and asks for less.
    buckets.pause("a", 2.0)
    assert buckets.ready_at("a", 1.0) == 60.0
    assert buckets.reserve("a", 1.0) == 59.0
    assert buckets.ready_at("b", 1.0) <= 1.0


def test_an_idle_host_gets_one_burst_and_not_an_hour_of_them() -> None:
    buckets = TokenBuckets(rate=2.0)
    buckets.reserve("a", 0.0)
    waits = [buckets.reserve("a", 3600.0) for _ in range(4)]
    assert waits == [0.0, 0.0, 0.5, 1.0]


def test_one_paused_host_does_not_hold_up_the_others() -> None:
    async def scenario() -> list[str]:
        buckets = TokenBuckets(rate=1000.0)
        buckets.pause("slow", time.monotonic() + 0.2)
        items = [("slow", n) for n in range(3)] + [("quick", n) for n in range(3)]
        queue = HostQueue(items, 2, buckets)
        order = []
        while (taken := await queue.take()) is not None:
            order.append(taken[0])
            queue.done(taken[0])
        return order

    assert asyncio.run(scenario()) == ["quick"] * 3 + ["slow"] * 3


def test_a_postponed_item_comes_back_and_a_host_never_exceeds_its_share() -> None:
    async def scenario() -> list[int]:
        queue = HostQueue([("a", n) for n in range(3)], 2, TokenBuckets(rate=1000.0))
        order = []
        first, second = await queue.take(), await queue.take()
        assert first is not None
        assert second is not None
        third = asyncio.create_task(queue.take())
        await asyncio.sleep(0.02)
        assert not third.done()
        queue.postpone("a", first[1], 0.05)
        taken = await third
        assert taken is not None
        order = [second[1], taken[1]]
        queue.done("a")
        queue.done("a")
        while (again := await queue.take()) is not None:
            order.append(again[1])
            queue.done("a")
        return order

    assert asyncio.run(scenario()) == [1, 2, 0]
