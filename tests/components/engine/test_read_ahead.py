"""Results come in order, a few ahead and no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from components.engine.read_ahead import read_ahead


def test_results_come_in_order_with_their_items() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0.0)
        return number**2

    found = list(read_ahead(slow_first, range(20), threads=3, ahead=5))
    assert found == [(number, number**2) for number in range(20)]
    assert list(read_ahead(slow_first, [], threads=3, ahead=5)) == []


def test_no_more_is_read_than_threads_work_on_and_as_many_wait() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            asked.append(number)
            yield number

    results = read_ahead(lambda number: number, items(), threads=2, ahead=4)
    for used in range(10):
        assert next(results)[0] == used
        assert len(asked) <= used + 4
    results.close()


def test_threads_work_beside_each_other() -> None:
    both = threading.Barrier(2, timeout=20)
    # Alone, the first would wait for the second for ever.
    assert len(list(read_ahead(lambda _: both.wait(), range(4), threads=2, ahead=2))) == 4


def test_an_exception_is_raised_in_its_turn_and_nothing_later_is_begun() -> None:
    begun: list[int] = []

    def odd(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("odd")
        return number

    results = read_ahead(odd, range(50), threads=1, ahead=2)
    assert next(results) == (0, 0)
    with pytest.raises(ValueError, match="odd"):
        next(results)
    assert len(begun) <= 4
