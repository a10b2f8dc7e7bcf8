"""Where compiled kernels are kept: by content, in the user's cache folder.

numba keys its cache by the path and time of the source file, so that every fresh clone would
compile again. Here the key is the hash of the source and its `*_kernels.py` neighbours; numba adds
the processor and its own version. Without a writable folder a kernel is compiled once per process.

A kernel that several processes ask for at once is compiled by the first of them, which holds the
kernel's lock file; the others load what it leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache, _CacheLocator

from components.files.holder_locks import lock_when_free

Kernel = TypeVar("Kernel")

_COMPILES_S = 60.0
"""Nobody waits longer for another's compiler: the process may have been stopped."""
_ASK_EVERY_S = 0.02


def cache_folder() -> Path:
    """NUMBA_CACHE_DIR, else `ultraflux/kernels` below XDG_CACHE_HOME or ~/.cache."""
    # Set at import from the environment; numba's typing does not know it.
    chosen = getattr(numba.config, "CACHE_DIR", "")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ultraflux" / "kernels"


class ContentLocator(_CacheLocator):
    """numba's question "where, and is it still valid" answered from the source's bytes."""

    def __init__(self, function: Callable[..., Any], source_path: str) -> None:
        # Kernels compile functions of their neighbours in, so all of them are the source.
        source = Path(source_path)
        sources = {source, *source.parent.glob("*_kernels.py")}
        # The name too: kernels of two files with the same neighbours are two entries.
        digest = hashlib.sha256(source.name.encode())
        for path in sorted(sources):
            digest.update(path.read_bytes())
        self._digest = digest.hexdigest()
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Callable[..., Any], source_path: str) -> ContentLocator | None:
        """None when the folder cannot be written."""
        locator = cls(function, source_path)
        try:
            locator.ensure_cache_path()  # type: ignore[no-untyped-call]
        except OSError:
            return None
        return locator

    def get_cache_path(self) -> str:
        """One folder per version of the source file."""
        return str(cache_folder() / self._digest[:24])

    def get_source_stamp(self) -> str:
        """The same source is the same kernel, wherever it stands."""
        return self._digest

    def get_disambiguator(self) -> str:
        """Functions of one name in one file differ by line."""
        return str(self._line)


class SharedCache(FunctionCache):
    """numba's cache of one function, in which one process at a time compiles.

    numba looks a kernel up, compiles it where it is missing, and saves it. The lock is held from
    the second look to the saving.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._lock_path = Path(self.cache_path) / f"{function.__name__}.lock"
        self._lock: int | None = None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept for this signature; None: whoever asked is to compile it."""
        found = super().load_overload(sig, target_context)
        if found is None:
            self._take_lock()
            # Whoever had the lock may have left it.
            found = super().load_overload(sig, target_context)
        if found is not None:
            self._give_lock_back()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, for those that wait."""
        try:
            super().save_overload(sig, data)
        finally:
            self._give_lock_back()

    def _take_lock(self) -> None:
        """Wait for the lock, not for ever, and do without where files cannot be locked."""
        # Of a kernel that could not be compiled, and was not saved.
        self._give_lock_back()
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return
        give_up_at = time.monotonic() + _COMPILES_S
        with contextlib.suppress(OSError):
            if lock_when_free(
                descriptor, lambda: time.monotonic() >= give_up_at, poll_s=_ASK_EVERY_S
            ):
                self._lock = descriptor
                return
        os.close(descriptor)

    def _give_lock_back(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def cached(kernel: Kernel) -> Kernel:
    """Let a numba function load its machine code from `cache_folder` and leave it there."""
    settings: Any = numba.config
    previous = settings.CACHE_LOCATOR_CLASSES
    # numba reads the setting when caching is enabled; put back at once, other people's kernels
    # keep their own rule.
    settings.CACHE_LOCATOR_CLASSES = f"{__name__}.{ContentLocator.__name__}"
    try:
        # RuntimeError: no locator, the folder is not writable.
        with contextlib.suppress(RuntimeError):
            # As its `enable_caching` does with numba's own class.
            kernel._cache = SharedCache(kernel.py_func)  # type: ignore[attr-defined]
    finally:
        settings.CACHE_LOCATOR_CLASSES = previous
    return kernel
