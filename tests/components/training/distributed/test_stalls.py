"""When ranks stand still: their beats are watched, and no wall clock."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from pathlib import Path

import pytest

from components.settings.schema import load_settings
from components.training.distributed.interruption import StopRequest
from components.training.distributed.supervision import _Supervised

LIMIT_MINUTES = 30.0


@pytest.mark.parametrize(
    ("poll_minutes", "beats", "is_stalled"),
    [(0.0, False, False), (10.0, True, False), (10.0, False, True)],
)
def test_ranks_stand_still_where_no_beat_changes_whatever_the_wall_clock_says(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poll_minutes: float,
    beats: bool,
    is_stalled: bool,
) -> None:
    runtime = load_settings(root / "params.yaml").runtime
    settings = runtime.model_copy(update={"collective_timeout_minutes": LIMIT_MINUTES})
    beat = tmp_path / "beats" / "0"
    beat.parent.mkdir()
    beat.touch()
    (tmp_path / "run" / "attempt_0").mkdir(parents=True)
    # In the place of torchrun; it ends with its input, after some polls.
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    polls, passed, sleep, wall = 0, 0.0, time.sleep, time.time
    calls = itertools.count()

    def polled(_: float) -> None:
        nonlocal polls, passed
        polls, passed = polls + 1, passed + 60 * poll_minutes
        if beats:
            # Of a machine whose clock is years behind, and is put back further.
            os.utime(beat, (10**9 - polls, 10**9 - polls))
        if polls == 10:
            process.stdin.close()
        sleep(0.001)

    monkeypatch.setattr(time, "sleep", polled)
    monkeypatch.setattr(time, "monotonic", lambda: passed)
    # Set an hour ahead in the middle.
    monkeypatch.setattr(time, "time", lambda: wall() + 3600.0 * (next(calls) > 0))
    supervised = _Supervised(process, tmp_path, settings, tmp_path / "restarts.jsonl")
    assert supervised.wait(StopRequest()) == 0
    expected = {0: "no rank has moved for 30 minutes"} if is_stalled else {}
    assert supervised._stalled == expected
