"""Where compiled kernels are kept: by content, in the user's cache folder.

numba keys its cache by the path and time of the source file, so that every fresh clone would
compile again. Here the key is the hash of the source and its `*_kernels.py` neighbours; numba adds
the processor and its own version. Without a writable folder a kernel is compiled once per process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import _CacheLocator

Kernel = TypeVar("Kernel")


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
            kernel.enable_caching()  # type: ignore[attr-defined]
    finally:
        settings.CACHE_LOCATOR_CLASSES = previous
    return kernel
