"""Answers that were paid for, and what they cost, in one SQLite file that survives kills.

An answer and its price are written in one transaction, and a request is charged with an estimate
*before* it is sent: whenever the process dies, no finished request is sent again and no money is
forgotten. API keys and pictures are not in it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS charges (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, usd REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS charges_by_job ON charges (job);
"""
# Two runs over one file take turns; no transaction here lasts longer than a write.
_BUSY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    finish_reason: str
    """The API's name ("stop", "length", ...); "refusal" where the API marked it as one."""
    input_tokens: int | None
    output_tokens: int | None
    """As billed; None where the endpoint does not say."""


class RequestCache:
    """Answers by key and charges by job; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            ValueError: `path` is something else than a request cache.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, _BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            # Write-ahead log: a killed process loses nothing, a power cut at most the last answers.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_TABLES)
        except sqlite3.DatabaseError as problem:
            self._connection.close()
            raise ValueError(
                f"{path.name}: not a usable request cache ({problem}); move the file away"
            ) from None

    def get(self, key: str) -> Answer | None:
        """The stored answer."""
        with self._lock:
            row = self._connection.execute(
                "SELECT text, finish_reason, input_tokens, output_tokens FROM answers WHERE key=?",
                (key,),
            ).fetchone()
        return Answer(*row) if row else None

    def charge(self, job: str, usd: float) -> int:
        """Note what a request that is about to be sent may cost; returns the charge's number."""
        with self._lock, self._connection:
            cursor = self._connection.execute(
                "INSERT INTO charges (job, usd) VALUES (?, ?)", (job, usd)
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def settle(
        self, charge: int, usd: float, key: str | None = None, answer: Answer | None = None
    ) -> None:
        """Replace the estimate of a charge by its price and keep the answer, both or neither."""
        with self._lock, self._connection:
            self._connection.execute("UPDATE charges SET usd=? WHERE id=?", (usd, charge))
            if key is not None and answer is not None:
                self._connection.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                    (
                        key,
                        answer.text,
                        answer.finish_reason,
                        answer.input_tokens,
                        answer.output_tokens,
                    ),
                )

    def spent(self, jobs: Sequence[str]) -> float:
        """USD charged to these jobs, over all runs."""
        marks = ", ".join("?" * len(jobs))
        with self._lock:
            query = f"SELECT TOTAL(usd) FROM charges WHERE job IN ({marks})"
            return float(self._connection.execute(query, tuple(jobs)).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> RequestCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
