"""Results of a function a few items ahead of whoever uses them, by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, `function(item)`) in the order of `items`.

    For work that releases the GIL (reading, decoding). At most `ahead` results are made or wait, so
    memory is bounded however slow the user is; an exception of `function` is raised in its item's
    turn.

    Args:
        function: safe to call from several threads.
        items: read only as fast as results are used.
        threads: at least 1.
        ahead: items that are begun before the first of them is handed out, at least `threads`.
    """
    source = iter(items)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            while True:
                for following in islice(source, ahead - len(waiting)):
                    waiting.append((following, pool.submit(function, following)))
                if not waiting:
                    return
                item, result = waiting.popleft()
                yield item, result.result()
        finally:
            # Whoever stops early does not wait for what nobody will use.
            for _, result in waiting:
                result.cancel()
