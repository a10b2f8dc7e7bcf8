"""One upload of what is there now, for who waits for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from flows.records.owners import close_ownerless
from flows.records.records import all_records, unsent_records
from flows.tracking.store_problems import TrackingAway, refuse_damaged
from flows.tracking.uploader import Uploader, tracking_uri
from flows.tracking.uploader_lock import uploader_lock


@dataclass(frozen=True)
class Synced:
    """What an upload left."""

    going_on: int
    """Runs without an end."""
    not_whole: int
    """Records that have ended, or cannot be sent, of which MLflow lacks something."""


def sync_once(root: Path) -> Synced:
    """Upload what is there now; faults of records are printed.

    Raises:
        TrackingAway: the project's experiment was deleted.
        Exception: whatever MLflow's client raises when the server cannot be reached.
    """
    close_ownerless(root)
    with uploader_lock(root):
        # Not those that end meanwhile.
        waiting = unsent_records(root)
        uploader = Uploader(root)
        uploader.sync()
        for fault in uploader.faults.values():
            print(f"error: {fault}", file=sys.stderr)
        not_whole = waiting & unsent_records(root) | uploader.faults.keys()
        going_on = sum(record.result is None for record in all_records(root))
        return Synced(going_on, len(not_whole))


def sync_now(root: Path) -> Synced:
    """`sync_once` for a person who waits.

    Raises:
        TrackingAway: MLflow did not take the records; they stay where they are.
        DamagedStore: it cannot read its own.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return sync_once(root)
    # A module that is not there: the driver of a database.
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError) as problem:
        refuse_damaged(tracking_uri(root), problem)
        raise TrackingAway.of(tracking_uri(root), problem) from None
