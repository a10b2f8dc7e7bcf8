"""Metrics over steps survive kills and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.telemetry.metric_log import MetricLog


def test_a_line_cut_by_a_kill_is_left_out_and_rewind_forgets_later_steps(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.log({"loss": 1.0 / (step + 1)}, step)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert log.series("loss")[0] == [0, 1, 2, 3]
    log.rewind(1)
    log.log({"loss": 9.0}, 2)
    assert log.series("loss") == ([0, 1, 2], [1.0, 0.5, 9.0])


@pytest.mark.parametrize("damage", [b'{"step": 1, "lo', b"\xff\xfe", b"\0\0", b"1733", b'"a"', b""])
def test_a_line_that_is_damaged_costs_itself_alone(tmp_path: Path, damage: bytes) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.log({"loss": 1.0}, step)
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert log.series("loss")[0] == [0, 2, 3]
    log.rewind(2)
    assert log.series("loss")[0] == [0, 2]


def test_nan_is_recorded_but_not_part_of_a_series(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.log({"loss": float("nan")}, 0)
    assert len(list(log.rows())) == 1
    assert log.series("loss") == ([], [])
