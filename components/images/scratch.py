"""Memory that one process uses again for every image, so that pages are not faulted in each time.

A fresh 4K image is 25 to 70 MB of pages that the kernel has to clear: as much work as half of its
decoding. The price is that a view is valid only until the next one of the same name is taken.
"""

from __future__ import annotations

import os
import threading

import numpy as np

_KEPT_BYTES = 256 * 2**20
"""Larger images get memory of their own: one giant must not stay for the rest of the run."""


class Scratch:
    """Named byte buffers that grow; they belong to the thread and process that first used them."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[str, np.ndarray] = {}
        self._owner: tuple[int, int] | None = None

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Uninitialised uint8 array of `shape`; what `name` was before is overwritten.

        Raises:
            RuntimeError: another thread or a forked process uses the same scratch memory.
        """
        here = (os.getpid(), threading.get_ident())
        if self._owner is None:
            self._owner = here
        if self._owner != here:
            raise RuntimeError("scratch memory is used by a second thread; give each its own")
        size = int(np.prod(shape, dtype=np.int64))
        if size > _KEPT_BYTES:
            return np.empty(shape, np.uint8)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            # The old one goes first: both together may be more than the worker has.
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        return buffer[:size].reshape(shape)
