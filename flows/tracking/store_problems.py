"""What is said of a tracking store that is damaged, held by another program, or away."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from flows.tracking.tier import sqlite_file

_DAMAGED = "file is not a database|database disk image is malformed"
_LOCKED = "database (table )?is locked"
_LONGEST_REASON = 200


class DamagedStore(RuntimeError):
    """The store's file is no database any more; one line that says what to do."""

    def __init__(self, file: Path, problem: object) -> None:
        """Of what SQLite says of the file."""
        super().__init__(
            f"{file} is damaged ({problem}): `ultraflux down`, move it aside and remove "
            "runs/records/*/mlflow.json, which name its runs; `ultraflux sync` then sends all "
            "records again"
        )


class TrackingAway(RuntimeError):
    """MLflow cannot be reached, is held by another program, or refuses the login; one line."""

    @classmethod
    def of(
        cls, store: str, problem: Exception, what: str = "records", then: str = "sync"
    ) -> TrackingAway:
        """Of what a library says of a store.

        Args:
            store: its address.
            problem: what was raised.
            what: it did not take.
            then: the command to give again.
        """
        # MLflow repeats the whole address and each library's words about it.
        reason = str(problem).partition(" failed with exception ")[2] or str(problem)
        reason = reason.rpartition("Caused by ")[2] or reason
        said = " ".join(reason.split())[:_LONGEST_REASON]
        # A person may have written a password into it.
        address = re.sub("//[^/@]*@", "//", store)
        kept = "they stay in runs/records; " if what == "records" else ""
        return cls(
            f"MLflow at {address} did not take the {what} ({said}): {kept}start it (`ultraflux "
            f"up`) or set MLFLOW_TRACKING_URI, then run `ultraflux {then}` again"
        )


def refuse_damaged(store: str, problem: Exception) -> None:
    """Tell what is said of a SQLite file that is damaged or held from a store that is away.

    Raises:
        DamagedStore: it is damaged.
        TrackingAway: another program holds it.
    """
    if not store.startswith("sqlite:"):
        return
    if said := re.search(_DAMAGED, str(problem)):
        raise DamagedStore(sqlite_file(store), said[0]) from None
    if re.search(_LOCKED, str(problem)):
        raise TrackingAway(
            f"{sqlite_file(store)} is locked by another program: close it and run this again; "
            "records stay in runs/records"
        ) from None


def mlflow_command(store: str, words: str) -> str:
    """What a person types for MLflow's own program to do something in a store.

    Args:
        store: its address; that of a server stands in clients.env, with the login.
        words: after `mlflow`.
    """
    place = f"MLFLOW_TRACKING_URI={shlex.quote(store)} " if store.startswith("sqlite:") else ""
    return f"`{place}mlflow {words}`"


def checked_address(given: str) -> str:
    """MLFLOW_TRACKING_URI as it was given.

    Raises:
        TrackingAway: it cannot be an address.
    """
    try:
        parts = urlsplit(given)
        # What a profile of Databricks has there is no port.
        _ = parts.scheme.startswith("databricks") or parts.port
    except ValueError:
        # Not with the address: it may hold a password.
        raise TrackingAway(
            "MLFLOW_TRACKING_URI is no address: look at what stands behind ://"
        ) from None
    return given


def ask_databases_briefly(store: str) -> None:
    """Where MLflow's client opens a database itself: not its ten tries, the last after minutes.

    As MLFLOW_HTTP_REQUEST_MAX_RETRIES of a server; MLflow has no variable for this one.
    """
    if not store.startswith(("http:", "https:", "file:", "/")):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 3
        # The last try's problem is raised, and said in one line.
        logging.getLogger(utils.__name__).setLevel(logging.ERROR)
