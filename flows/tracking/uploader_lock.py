"""One uploader at a time in a clone, in a temporary folder of its own."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def uploader_lock(root: Path) -> Iterator[None]:
    """Hold the lock of the records at `root`; another uploader is waited for."""
    path = root / "runs" / "records" / ".uploader.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with _own_temporary(path.with_name(".uploading")):
            yield


@contextmanager
def _own_temporary(folder: Path) -> Iterator[None]:
    """MLflow's client packs what it sends in temporary folders: here the next uploader clears them.

    A killed one would leave its own in TMPDIR for ever.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
