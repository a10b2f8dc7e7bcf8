"""Captions that wait on disk, found by key: those of a million photographs are a gigabyte."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Value = TypeVar("Value", bound="DataclassInstance")


class Spilled(Mapping[str, Value]):
    """Records of text and numbers by key, in the order in which they were added.

    Args:
        kind: dataclass of the records.
    """

    def __init__(self, kind: type[Value]) -> None:
        self._kind = kind
        names = [field.name for field in fields(kind)]
        # A database without a name is a temporary file that grows beyond a small cache.
        self._database = sqlite3.connect("", isolation_level=None)
        columns = ", ".join(["number integer primary key", "key text unique", *names])
        self._database.execute(f"create table records ({columns})")
        self._database.execute("pragma journal_mode = off")
        self._database.execute("begin")
        self._names = ", ".join(names)
        places = ", ".join("?" * (1 + len(names)))
        self._insert = f"insert or replace into records (key, {self._names}) values ({places})"

    def add(self, key: str, value: Value) -> None:
        """Keep a record; it replaces one of the same key."""
        self._database.execute(self._insert, (key, *astuple(value)))

    def __getitem__(self, key: str) -> Value:
        found: tuple[Any, ...] | None = self._database.execute(
            f"select {self._names} from records where key = ?", (key,)
        ).fetchone()
        if found is None:
            raise KeyError(key)
        return self._kind(*found)

    def __iter__(self) -> Iterator[str]:
        for (key,) in self._database.execute("select key from records order by number"):
            yield key

    def __len__(self) -> int:
        return int(self._database.execute("select count(*) from records").fetchone()[0])
