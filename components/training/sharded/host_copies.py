"""Copies of training state in host memory, taken fast enough to stand between two steps.

On CUDA the copies lie in pinned memory and are queued on the current stream: the next optimizer
step is queued behind them, so training goes on before they are complete and still never changes
what is copied. The memory is kept for the next save: pinning (and on CPU the first touch of every
page) costs more than the copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.Size)


class HostCopies:
    """Takes copies under names; taking one again overwrites what that name held before."""

    def __init__(self) -> None:
        """Nothing is allocated until the first copy."""
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, name: str, state: Any) -> Any:
        """A copy of `state` whose tensors lie in host memory, contiguous.

        Dictionaries, lists and tuples are walked; any other object is deep-copied. A tensor that
        occurs twice is copied once. On CUDA, call the function returned by `fence` before reading.

        Args:
            name: whose memory is used again, such as the file that the state goes to.
            state: nested containers with tensors on any device.
        """
        before = self._buffers.get(name, [])
        # The source stands beside its copy, so that no id is given out twice meanwhile.
        taken: dict[int, tuple[Tensor, Tensor]] = {}

        def host(tensor: Tensor) -> Tensor:
            if id(tensor) not in taken:
                # Buffers are matched by order of appearance: a state has the same layout at every
                # save.
                number = len(taken)
                old = before[number] if number < len(before) else None
                taken[id(tensor)] = (tensor, _copy_into(old, tensor))
            return taken[id(tensor)][1]

        copied = _walk(state, host)
        self._buffers[name] = [buffer for _, buffer in taken.values()]
        return copied

    @staticmethod
    def fence() -> Callable[[], None]:
        """A function that returns when every copy taken so far is complete (from any thread)."""
        if not torch.cuda.is_available():
            return lambda: None
        event = torch.cuda.Event()
        # Queued behind the copies, on the stream that makes them.
        event.record()
        return event.synchronize


def _copy_into(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    """Values of `tensor` in `buffer`, or in new memory where that does not fit."""
    source = tensor.detach()
    if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
        buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    # Does not wait only from CUDA into pinned memory; `fence` tells when it is done.
    return buffer.copy_(source, non_blocking=True)


def _walk(value: Any, host: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor replaced by `host(tensor)` and nothing shared that can change."""
    if isinstance(value, Tensor):
        return host(value)
    # The class is kept because it is part of the pickled file.
    if isinstance(value, dict):
        items = ((key, _walk(item, host)) for key, item in value.items())
        return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)
    # Exactly these two: a named tuple is not built from one iterable.
    if type(value) in (list, tuple):
        return type(value)(_walk(item, host) for item in value)
    # Anything else, such as a loss scaler, goes on changing while the file is written.
    return value if isinstance(value, _PLAIN) else copy.deepcopy(value)
