"""A stage's position as a Prefect progress artifact while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.records.records import read_json

INTERVAL_S = 5.0


@contextmanager
def reported_progress(position: Path, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Copy the position file of a stage (`done`, `total`) into an artifact of this flow run.

    Short stages, which never write one, get no artifact and pay nothing.
    """
    ended = threading.Event()
    artifact: UUID | None = None

    def show() -> None:
        nonlocal artifact
        said = read_json(position)
        if not said or not said.get("total"):
            return
        percent = 100.0 * said["done"] / said["total"]
        if artifact is None:
            made = create_progress_artifact(percent, description="Position of the stage")
            artifact = cast(UUID, made)
        else:
            update_progress_artifact(artifact, percent)

    def watch() -> None:
        while not ended.wait(interval_s):
            show()

    # Artifacts belong to the run of the thread's context.
    context = copy_context()
    thread = threading.Thread(target=lambda: context.run(watch), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
