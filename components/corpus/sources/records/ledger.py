"""Double entry over the files of a source: what a reader counted against what came out of it.

The reader counts lines (rows, members) as they come off the disk; the ledger adds up what the
records and losses say they stand for. A parser that swallows lines makes the two differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from components.corpus.sources.records.source_records import SourceEnd, SourceItem, SourceRecord


@dataclass(frozen=True)
class FileAccount:
    """One file: `total` = `in_records` + `in_losses` + the sum of `apart`."""

    file: str
    unit: str
    total: int
    apart: dict[str, int]
    records: int
    in_records: int
    """Units that the records stand for: more than `records` where one spans several lines."""
    losses: int
    in_losses: int
    notes: dict[str, int]


@dataclass
class Ledger:
    """Accounts of all files so far, and the one that is open."""

    files: list[FileAccount] = field(default_factory=list)
    _records: int = 0
    _in_records: int = 0
    _losses: int = 0
    _in_losses: int = 0

    def add(self, record: SourceRecord) -> None:
        """Enter a record or loss of the file that is being read."""
        if record.values is None:
            self._losses += 1
            self._in_losses += record.units
        else:
            self._records += 1
            self._in_records += record.units

    def close(self, end: SourceEnd) -> None:
        """Balance the file that has been read.

        Raises:
            ValueError: something of it is neither a record nor a counted loss.
        """
        account = FileAccount(
            end.file,
            end.unit,
            end.total,
            dict(end.apart),
            self._records,
            self._in_records,
            self._losses,
            self._in_losses,
            dict(end.notes),
        )
        self._records = self._in_records = self._losses = self._in_losses = 0
        # The two sides come from different code: the reader's count of the file, and what the
        # records claim.
        found = account.in_records + account.in_losses + sum(account.apart.values())
        if found != account.total:
            raise ValueError(
                f"{account.file}: {account.total} {account.unit} were read and {found} are "
                "accounted for; this is a fault of the reader, please report it"
            )
        self.files.append(account)

    def report(self) -> dict[str, Any]:
        """Sums over all files by unit, and every file; JSON-able."""
        return {"totals": self._totals(), "files": [vars(account) for account in self.files]}

    def _totals(self) -> dict[str, dict[str, Any]]:
        totals: dict[str, dict[str, Any]] = {}
        for account in self.files:
            sums = totals.setdefault(
                account.unit,
                dict.fromkeys(("files", "total", "records", "in_records", "losses", "in_losses"), 0)
                | {"apart": Counter(), "notes": Counter()},
            )
            sums["files"] += 1
            for name in ("total", "records", "in_records", "losses", "in_losses"):
                sums[name] += getattr(account, name)
            sums["apart"].update(account.apart)
            sums["notes"].update(account.notes)
        return {
            unit: {**sums, "apart": dict(sums["apart"]), "notes": dict(sums["notes"])}
            for unit, sums in sorted(totals.items())
        }


def balanced(items: Iterable[SourceItem], ledger: Ledger) -> Iterator[SourceRecord]:
    """The records and losses of a source, each entered in `ledger`, each file balanced.

    Raises:
        ValueError: see `Ledger.close`.
    """
    for item in items:
        if isinstance(item, SourceEnd):
            ledger.close(item)
        else:
            ledger.add(item)
            yield item
