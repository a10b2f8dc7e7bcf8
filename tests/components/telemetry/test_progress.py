"""Progress for a supervisor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.telemetry import progress
from components.telemetry.progress import PROGRESS_FILE, track


def test_the_last_position_is_written_for_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "vae.json"
    monkeypatch.setenv(PROGRESS_FILE, str(target))
    assert list(track(range(3), "vae", initial=2)) == [0, 1, 2]
    assert json.loads(target.read_text()) == {"description": "vae", "done": 5, "total": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["vae.json"]


def test_without_a_terminal_a_line_with_the_time_to_go_is_printed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(progress.PROGRESS_FILE, raising=False)
    clock = iter(range(0, 1000, 10))  # an item takes 10 s
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    items = progress.track(range(4), "dit", total=10, initial=6, note=lambda: "loss 0.5")
    assert list(items) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "dit: 9 of 10, 00:30 passed, 00:10 to go, loss 0.5\n"
