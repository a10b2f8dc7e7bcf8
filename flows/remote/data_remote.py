"""The DVC remote of this clone: named by the environment, pulled from and pushed to.

`ULTRAFLUX_DVC_REMOTE` holds a folder or an address that DVC understands (`s3://bucket/path`).
Credentials and endpoints come from the environment that the storage's own tools read
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...) and are never written down here. Without the variable
DVC's default remote counts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flows.versioning.graph import open_repo

T = TypeVar("T")
REMOTE = "ULTRAFLUX_DVC_REMOTE"
PATIENCE = "ULTRAFLUX_REMOTE_PATIENCE_S"
"""For how long an unreachable remote is asked again, in seconds."""
DEFAULT_PATIENCE_S = 600.0
REMOTE_NAME = "ultraflux"
# botocore's minute per attempt would make a dead endpoint look like a slow one.
TIMEOUTS_S = {"connect_timeout": 10, "read_timeout": 60}
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class RemoteFailed(RuntimeError):
    """The remote is not set up, cannot be reached, or lacks what is asked for; one line."""

    def __init__(self, message: str, *, away: bool = False) -> None:
        """Say what is wrong.

        Args:
            message: the line.
            away: the remote does not answer, so asking again later may help.
        """
        super().__init__(message)
        self.away = away


def configure(root: Path) -> str:
    """Make the remote that the environment names this clone's default; returns its address.

    It goes to `.dvc/config.local`, which git ignores, so `dvc pull` by hand finds it too.

    Raises:
        RemoteFailed: no remote, an address with a password in it, or a folder that is not there.
    """
    wanted = os.environ.get(REMOTE, "")
    if wanted:
        _write(root, _checked(wanted))
    with open_repo(root) as repo:
        name = repo.config["core"].get("remote")
        if not name:
            raise RemoteFailed(
                f"no DVC remote: set {REMOTE} to a folder or s3:// address that every machine "
                "reaches, or `dvc remote add -d NAME ADDRESS`"
            )
        url = str(repo.config["remote"][name]["url"])
    if "://" not in url and not Path(url).is_dir():
        # DVC would make the folder: results would lie beside a share that is not mounted.
        raise RemoteFailed(
            f"remote {url} is no folder here: mount it, or make it once with mkdir", away=True
        )
    return url


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        # Not with the address: it may hold a password.
        raise RemoteFailed(f"{REMOTE} is no address: look at what stands behind ://") from None
    # The address goes into a file, messages and MLflow tags.
    if parts.password or (parts.username and parts.scheme != "ssh"):
        raise RemoteFailed(
            f"{REMOTE} has credentials in it: leave them out, the storage's own variables "
            "(AWS_ACCESS_KEY_ID, ...) are read"
        )
    if not parts.scheme and not Path(url).is_absolute():
        raise RemoteFailed(f"{REMOTE}={url}: give an absolute folder or an address such as s3://")
    return url


def _write(root: Path, url: str) -> None:
    values = {"url": url, **(TIMEOUTS_S if url.startswith("s3://") else {})}
    with open_repo(root) as repo:
        now = repo.config["remote"].get(REMOTE_NAME, {})
        # Unchanged: another process may be reading the file just now.
        if repo.config["core"].get("remote") == REMOTE_NAME and dict(now) == values:
            return
        with repo.config.edit("local") as config:
            config["remote"][REMOTE_NAME] = values
            config["core"]["remote"] = REMOTE_NAME


def pull(root: Path, paths: Iterable[str]) -> None:
    """Bring exactly `paths` (outputs, or parts of them) from the remote into the workspace.

    What is here already is not asked for, so a remote that is away does not matter then.

    Raises:
        RemoteFailed: unreachable for as long as patience lasts, or a file is not there.
    """
    # Absolute: inside a process DVC takes targets relative to the current folder.
    targets = [str(root / path) for path in _absent(root, paths)]
    if targets:
        patiently(root, "dvc pull", lambda repo: repo.pull(targets=targets, force=True))


def push(root: Path, paths: Iterable[str]) -> None:
    """Send `paths` (outputs) as far as the remote lacks them.

    Raises:
        RemoteFailed: unreachable for as long as patience lasts.
    """
    targets = [str(root / path) for path in paths]
    if targets:
        patiently(root, "dvc push", lambda repo: repo.push(targets=targets))


def tracked(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that DVC can bring: outputs of stages or `.dvc` files, or parts of them."""
    from dvc.exceptions import OutputNotFoundError

    found = []
    with open_repo(root) as repo:
        for path in paths:
            try:
                repo.find_outs_by_path(str(root / path), strict=False)
            except OutputNotFoundError:
                continue
            found.append(path)
    return found


def _absent(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that are not in the workspace as dvc.lock (or a `.dvc` file) has them."""
    with open_repo(root) as repo:
        return [
            path
            for path in paths
            if any(
                out.workspace_status()
                for out in repo.find_outs_by_path(str(root / path), strict=False)
            )
        ]


def patiently(root: Path, what: str, act: Callable[[Any], T]) -> T:
    """Do `act` with the opened repository, again with growing pauses while the remote is away.

    Args:
        root: of the clone; its remote is made the default first.
        what: first words of the line that says what went wrong.
        act: talks to the remote.

    Returns:
        What `act` returns.

    Raises:
        RemoteFailed: the remote is not set up, lacks something, or stays away.
    """
    deadline = time.monotonic() + _patience_s()
    pause = FIRST_WAIT_S
    while True:
        try:
            return _attempt(root, what, act)
        except RemoteFailed as problem:
            if not problem.away or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_WAIT_S)


def _patience_s() -> float:
    given = os.environ.get(PATIENCE) or str(DEFAULT_PATIENCE_S)
    with suppress(ValueError):
        if (seconds := float(given)) >= 0:
            return seconds
    raise RemoteFailed(f"{PATIENCE}={given}: give a number of seconds from 0 on")


def _attempt(root: Path, what: str, act: Callable[[Any], T]) -> T:
    from dvc.exceptions import CheckoutError

    url = configure(root)
    with _errors() as errors:
        try:
            with open_repo(root) as repo:
                return act(repo)
        except CheckoutError as problem:
            names = ", ".join(
                os.path.relpath(target, root) for target in sorted(problem.target_infos)[:3]
            )
            raise RemoteFailed(
                f"{what}: {url} lacks {names}: `dvc push` where it was made"
            ) from problem
        except Exception as problem:
            # What DVC logged first says more than "3 files failed to upload".
            text = " ".join((errors[0] if errors else str(problem)).split())
            named = text or type(problem).__name__
            raise RemoteFailed(f"{what}: {url}: {named}", away=True) from problem


class _Collector(logging.Handler):
    """Keeps the first line of every error."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Note one record."""
        cause = record.exc_info[1] if record.exc_info else None
        self._lines.append(" ".join(str(cause or record.getMessage()).split())[:300])


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What DVC's loggers call errors while the block runs."""
    lines: list[str] = []
    handler = _Collector(lines)
    # DVC logs the cause of each file's failure and raises only their number.
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
