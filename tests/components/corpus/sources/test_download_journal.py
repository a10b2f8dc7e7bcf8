from __future__ import annotations

from pathlib import Path

from components.corpus.sources.download_journal import DownloadJournal, Loss, Outcome, Stored


def test_losses_are_forgotten_under_other_settings_and_originals_are_not(tmp_path: Path) -> None:
    kept = Outcome(1, Stored("a" * 64, ".jpg", 5, None, None, None, "broken"))
    lost = Outcome(3, Loss("timeout", "x"))
    with DownloadJournal(tmp_path / "j.sqlite", "one") as journal:
        journal.put("kept", kept)
        journal.put("lost", lost)
        assert (journal.get("kept"), journal.get("lost")) == (kept, lost)
    with DownloadJournal(tmp_path / "j.sqlite", "two") as journal:
        assert (journal.get("kept"), journal.get("lost")) == (kept, None)
