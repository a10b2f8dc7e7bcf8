from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from pathlib import Path

from PIL import Image

from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored
from components.images.decoding import read_header


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


PHOTO = _turned()


def test_losses_are_forgotten_under_other_settings_and_originals_are_not(tmp_path: Path) -> None:
    kept = Outcome(1, Stored("a" * 64, ".jpg", 5, None, None, None, "broken"))
    lost = Outcome(3, Loss("timeout", "x"))
    with DownloadJournal(tmp_path / "j.sqlite", "one") as journal:
        journal.put(("kept", kept))
        journal.put(("lost", lost))
        assert (journal.get("kept"), journal.get("lost")) == (kept, lost)
    with DownloadJournal(tmp_path / "j.sqlite", "two") as journal:
        assert (journal.get("kept"), journal.get("lost")) == (kept, None)


def test_a_journal_of_version_one_is_continued_and_its_originals_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.executescript(
            """
            create table outcomes (
              key text primary key, attempts integer not null,
              sha256 text, extension text, size_bytes integer,
              width integer, height integer, format text, integrity text,
              cause text, detail text, settings text
            ) without rowid;
            insert into outcomes values
              ('a', 2, 'cc', '.jpg', 5, 60, 40, 'JPEG', 'ok', null, null, 'one');
            pragma user_version = 1;
            """
        )
    header = read_header(PHOTO)
    new = Outcome(1, Stored("dd", ".jpg", len(PHOTO), 40, 60, "JPEG", "ok", header))
    for _ in range(2):
        with DownloadJournal(path, "one") as journal:
            assert journal.get("a") == Outcome(2, Stored("cc", ".jpg", 5, 60, 40, "JPEG", "ok"))
            journal.put(("b", new))
            assert journal.get("b") == new
