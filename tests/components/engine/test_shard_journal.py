"""Rows that are on disk before their shard is."""

from __future__ import annotations

from pathlib import Path

from components.engine.shard_journal import ShardJournal

ROWS = {3: {"score": 0.1 + 0.2, "text": "a\nlake"}, 0: {"score": None, "text": "湖"}}


def journal_of(folder: Path) -> ShardJournal:
    journal = ShardJournal(folder / "shard.parquet")
    for place, row in ROWS.items():
        journal.add(place, row)
    return journal


def test_rows_come_back_by_place_until_the_shard_is_written(tmp_path: Path) -> None:
    assert ShardJournal(tmp_path / "shard.parquet").read() == {}
    journal = journal_of(tmp_path)
    assert ShardJournal(tmp_path / "shard.parquet").read() == ROWS
    journal.remove()
    assert journal.read() == {}
    assert not list(tmp_path.iterdir())
    journal.remove()


def test_what_a_kill_cut_short_is_dropped_and_spoils_no_row_that_follows(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        kept = {3: ROWS[3]} if length >= first else {}
        assert journal.read() == kept
        journal.add(7, {"score": 1.0})
        assert journal.read() == kept | {7: {"score": 1.0}}
