"""What other copies of a photograph's bytes are credited with, kept in the row of the photograph.

A source may hold the same bytes under several names, each with another author or licence. One of
them is the photograph; who may be shown in it and under which terms is asked of all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.manifest_copies import rewrite_manifest

OTHER_CREDITS = "other_credits"
CREDITS = ("photographer", "photographer_url", "image_url", "work_url", "license")
"""What of a record, or of a row of an attribution file, says whose photograph it is."""
_CAPTIONS = ("caption_en", "caption_zh")

Credit = dict[str, str]


def credit_of(row: Mapping[Any, Any]) -> Credit:
    """`CREDITS` of a row, as far as it has them."""
    return {name: row[name] for name in CREDITS if isinstance(row.get(name), str)}


def joined(own: Credit, others: Iterable[Credit]) -> Credit:
    """The credit of a photograph, with those of its copies that differ under `OTHER_CREDITS`.

    One without author and licence takes the first that has either.
    """
    different = [other for other in others if other and other != own]
    if not different:
        return own
    known: Credit = {}
    # Never half of one: somebody's name beside somebody else's licence would be neither's credit.
    if not {"photographer", "license"} & set(own):
        known = next((one for one in different if {"photographer", "license"} & set(one)), {})
    own = known | own
    left = [other for other in different if other != own]
    text = json.dumps(left, ensure_ascii=False, sort_keys=True)
    return own | {OTHER_CREDITS: text} if left else own


def other_credits(table: pd.DataFrame) -> Iterator[tuple[int, list[Credit]]]:
    """(position, credits of the copies) of the rows of a manifest that have any."""
    if OTHER_CREDITS not in table:
        return
    texts = table[OTHER_CREDITS]
    for position in texts.notna().to_numpy().nonzero()[0].tolist():
        yield position, json.loads(texts.iloc[position])


class DroppedCopies:
    """What dropped records say of bytes that another record has brought; held on disk."""

    def __init__(self) -> None:
        # A database without a name is a temporary file that grows beyond a small cache.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            "create table credits (number integer primary key, image_id text, credit text, "
            "unique (image_id, credit));"
            f"create table captions (image_id text primary key, {', '.join(_CAPTIONS)});"
        )
        self._database.execute("pragma journal_mode = off")
        self._database.execute("begin")
        self._is_empty = True

    def add(self, image_id: str, row: Mapping[str, Any]) -> None:
        """Keep what a dropped record says; the first caption, and every credit once."""
        self._is_empty = False
        credit = json.dumps(credit_of(row), ensure_ascii=False, sort_keys=True)
        self._database.execute(
            "insert or ignore into credits (image_id, credit) values (?, ?)", (image_id, credit)
        )
        if row.get("caption_en"):
            self._database.execute(
                "insert or ignore into captions values (?, ?, ?)",
                (image_id, *(row.get(name) for name in _CAPTIONS)),
            )

    def complete(self, manifest: Path) -> None:
        """Write it into the rows of a manifest: credits beside theirs, a caption where none is."""
        if not self._is_empty:
            # Beside it: the rows are read while they are written.
            completed = manifest.with_name(f".{manifest.name}.completed")
            read = ("image_id", *CREDITS, *_CAPTIONS)
            rewrite_manifest(manifest, read, self._completed, completed)
            completed.replace(manifest)

    def _completed(self, rows: pd.DataFrame) -> pd.DataFrame:
        columns = [*CREDITS, *_CAPTIONS, OTHER_CREDITS]
        found = [self._row(row) for row in rows.to_dict("records")]
        return pd.DataFrame(found, columns=columns, dtype=object)

    def _row(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        image_id = (row["image_id"],)
        texts = self._database.execute(
            "select credit from credits where image_id = ? order by number", image_id
        )
        captions = {name: row[name] for name in _CAPTIONS}
        if not isinstance(row["caption_en"], str):
            found = self._database.execute(
                f"select {', '.join(_CAPTIONS)} from captions where image_id = ?", image_id
            ).fetchone()
            captions = captions if found is None else dict(zip(_CAPTIONS, found, strict=True))
        return captions | joined(credit_of(row), (json.loads(text) for (text,) in texts))
