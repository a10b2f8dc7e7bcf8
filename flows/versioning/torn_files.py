"""DVC's own files after a kill: it rewrites them in place and refuses every command on half of one.

Both are mended where DVC is asked or started, before it looks: nothing is lost by a kill between
the moment in which a file is emptied and the one in which it is written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.files.holder_locks import try_lock
from components.files.whole_files import write_bytes

KEPT_LOCK = "runs/dvc.lock"
"""dvc.lock as it was whole for the last time."""
TORN_LOCK = "runs/dvc.lock.torn"
_PATIENCE_S, _ASK_EVERY_S = 10.0, 0.05


def mend_after_kills(root: Path) -> None:
    """Mend what a kill of DVC has left half-written; keep a copy of what is whole."""
    clear_torn_rwlock(root)
    mend_lock(root)


def clear_torn_rwlock(root: Path) -> None:
    """Remove DVC's table of busy paths when a killed process left it half-written.

    The table holds claims of running processes only; DVC's own guard is held here, so nobody is
    writing it now.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    folder = root / ".dvc" / "tmp"
    table = folder / RWLOCK_FILE
    # Looked at without the lock first: it is whole nearly always, and the lock may be held for
    # long.
    if not _is_torn(table):
        return
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder), wait=True):
        if _is_torn(table):
            table.unlink()


def _is_torn(table: Path) -> bool:
    try:
        json.loads(table.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except json.JSONDecodeError:
        return True
    return False


def mend_lock(root: Path) -> None:
    """dvc.lock without an end becomes what it was before; else the copy follows it.

    What the stage that was saved in that moment has made is there, and so is its entry in DVC's
    cache of runs: the next run looks at it again and repeats nothing.
    """
    # A folder that cannot be written keeps no copy, and DVC says what it cannot write itself.
    with suppress(OSError):
        _keep_or_restore_lock(root)


def _keep_or_restore_lock(root: Path) -> None:
    until = time.monotonic() + _PATIENCE_S
    while (content := _content(root / "dvc.lock")) != _content(root / KEPT_LOCK):
        with _turn(root) as is_ours:
            if is_ours:
                _settle(root)
                return
        # Somebody saves a stage at this moment. Half of it would be read as a broken file, and a
        # whole one is kept by whoever asks next.
        if _is_whole(content) or time.monotonic() > until:
            return
        time.sleep(_ASK_EVERY_S)


def _settle(root: Path) -> None:
    """Copy dvc.lock, or bring the copy back; DVC's lock is held."""
    lock, kept = root / "dvc.lock", root / KEPT_LOCK
    content = _content(lock)
    if content is None:
        # Removed, to begin anew: an old copy must not come back.
        kept.unlink(missing_ok=True)
        return
    if _is_whole(content):
        write_bytes(kept, content)
        return
    before = _content(kept)
    aside = ""
    if content:
        write_bytes(root / TORN_LOCK, content)
        aside = f" (what was left of it: {TORN_LOCK})"
    if before is None:
        lock.unlink()
        now = "no whole one is known, so it is removed"
    else:
        write_bytes(lock, before)
        now = "it is again as it was before"
    print(f"dvc.lock was cut off by a kill; {now}{aside}", file=sys.stderr, flush=True)


def _is_whole(content: bytes | None) -> bool:
    """DVC ends the file with a line end, and so do people."""
    return content is None or content.endswith(b"\n")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _turn(root: Path) -> Iterator[bool]:
    """Hold the lock under which DVC writes dvc.lock, if nobody has it."""
    with (root / ".dvc" / "tmp" / "lock").open("a") as file:
        yield try_lock(file)
