"""Working trees over one DVC cache that run at the same time compute an equal stage once.

A tree takes a file lock named by the stage's key before it runs the stage. One that had to wait
finds the result in DVC's run cache. The lock is the kernel's, so a killed tree holds nobody up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from components.files.holder_locks import lock_when_free
from flows.versioning import graph as versioning

SHARED_TURNS = "ULTRAFLUX_SHARED_TURNS"
"""Environment variable: folder of the locks, one for all trees; unset: there are no other trees."""


@contextmanager
def shared_turn(root: Path, stage: str, stopping: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other tree runs this stage on equal inputs, and keep others waiting.

    Args:
        root: the tree; the stage's inputs are there.
        stage: name in dvc.yaml.
        stopping: ends the wait.
    """
    folder = os.environ.get(SHARED_TURNS)
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Equal keys mean equal inputs; trees that differ in this stage do not wait for each other.
    with (Path(folder) / f"{stage}-{versioning.stage_key(root, stage)[:16]}").open("w") as file:
        lock_when_free(file, stopping)
        yield
