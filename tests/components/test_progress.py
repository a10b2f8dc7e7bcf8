"""Progress for a supervisor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.progress import PROGRESS_FILE, track


def test_the_last_position_is_written_for_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "vae.json"
    monkeypatch.setenv(PROGRESS_FILE, str(target))
    assert list(track(range(3), "vae", initial=2)) == [0, 1, 2]
    assert json.loads(target.read_text()) == {"description": "vae", "done": 5, "total": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["vae.json"]
