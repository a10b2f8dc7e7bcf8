"""What comes back of an exception in a worker process."""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any

import pytest

from components.engine.ordered_pool import EngineLimits, Failure, Item, OrderedPool
from components.files.weight_folders import ComponentsMissing, WeightsMissing


def test_a_failure_is_told_by_class_and_subclass_and_not_by_what_its_message_says() -> None:
    lost = WeightsMissing("VAE", "weights/vae", "hf download x")
    failure = pickle.loads(pickle.dumps(Failure.of(ComponentsMissing([lost]))))
    assert failure.is_a(ComponentsMissing)
    assert failure.is_a(WeightsMissing)
    assert not failure.is_a(ValueError)
    namesake = type("WeightsMissing", (RuntimeError,), {"__module__": "elsewhere"})
    assert not Failure.of(namesake("no")).is_a(WeightsMissing)
    assert Failure.of(namesake("no")).message == "WeightsMissing: no"


def test_a_message_is_one_line_and_empty_ones_end_with_the_class() -> None:
    assert Failure.of(RuntimeError("two\n  lines")).message == "RuntimeError: two lines"
    assert Failure.of(KeyError()).message == "KeyError"
    assert not Failure("worker killed by SIGSEGV").is_a(Exception)


class LastFirst(OrderedPool):
    """A pool without workers that answers the payload read last, a call of `_step` each."""

    def __init__(self, window: int, retries: int = 0) -> None:
        super().__init__(EngineLimits(workers=1, timeout_s=1, memory_mb=1, retries=retries))
        self.window, self.tried = window, []

    def _window(self) -> int:
        return self.window

    def _step(self, queue: deque[Item], done: dict[int, Any], open_items: int) -> None:
        assert open_items == len(queue)
        item = queue.pop()
        self.tried.append(item.index)
        self._finish(item, Failure("no") if item.payload is None else item.payload, queue, done)

    def _end(self, finished: bool) -> None:
        self.finished = finished


def test_no_more_than_the_window_is_read_ahead_of_the_first_open_item() -> None:
    taken, read = [], []

    def payloads():
        for number in range(20):
            read.append(number)
            # However many are done, the first of them waits for its turn.
            assert len(read) - len(taken) <= 4
            yield 10 * number

    pool = LastFirst(window=4)
    for result in pool.map(payloads()):
        taken.append(result)
    assert taken == [10 * number for number in range(20)]
    assert pool.tried[:4] == [3, 2, 1, 0]
    assert pool.finished


@pytest.mark.parametrize("retries", [0, 2])
def test_a_failing_item_is_tried_once_and_as_often_again_as_there_are_retries(retries: int) -> None:
    pool = LastFirst(window=3, retries=retries)
    seen = []
    results = list(pool.map([1, None, 3], lambda number, result: seen.append(number)))
    assert results == [1, Failure("no"), 3]
    assert [pool.tried.count(number) for number in range(3)] == [1, 1 + retries, 1]
    assert sorted(seen) == [0, 1, 2]
