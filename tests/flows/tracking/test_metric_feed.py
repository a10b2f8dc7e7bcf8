"""Every point of a metric file arrives once, whatever fails in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.telemetry.metric_log import MetricLog
from flows.tracking import metric_feed
from flows.tracking.metric_feed import Point, deliver


class Server:
    """Keeps distinct points, as MLflow's database does; may fail before or after it kept them."""

    def __init__(self) -> None:
        self.points: set[Point] = set()
        self.saved: dict[str, Any] = {}

    def send(self, points: list[Point], fault: str = "") -> None:
        if fault == "refused":
            raise ConnectionError
        self.points |= set(points)
        if fault == "answer lost":
            raise ConnectionError

    def run(self, path: Path, fault: str = "") -> None:
        """One uploader from what was noted last."""
        state = json.loads(json.dumps(self.saved))

        notes = 0

        def note() -> None:
            nonlocal notes
            notes += 1
            if fault == f"killed at note {notes}":
                raise KeyboardInterrupt
            self.saved = json.loads(json.dumps(state))

        try:
            deliver(path, state, lambda points: self.send(points, fault), note)
        except (ConnectionError, KeyboardInterrupt):
            assert fault

    def steps(self, key: str) -> list[int]:
        return sorted(point.step for point in self.points if point.key == key)


FAULTS = ("", "refused", "answer lost", *(f"killed at note {n}" for n in (1, 2, 3)))
ACTION = st.one_of(
    st.tuples(st.just("log"), st.integers(1, 5)),
    st.tuples(st.just("rewind"), st.integers(0, 6)),
    st.tuples(
        st.just("upload"),
        st.sampled_from(FAULTS),
    ),
)


@given(actions=st.lists(ACTION, max_size=25), batch=st.integers(1, 7))
def test_steps_arrive_exactly_once_after_faults_and_resumes(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, Any]], batch: int
) -> None:
    path = tmp_path_factory.mktemp("feed") / "metrics.jsonl"
    log, server, step = MetricLog(path), Server(), 0
    highest = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_feed, "BATCH", batch)
        for action, value in actions:
            if action == "log":
                for _ in range(value):
                    step += 1
                    # A resumed step has the same loss and another duration.
                    log.log({"loss": 1 / step, "step_s": step + len(server.points)}, step)
            elif action == "rewind":
                step = max(0, step - value)
                log.rewind(step)
            else:
                server.run(path, value)
            highest = max(highest, step)
        server.run(path)
        everything = step
    arrived = server.steps("loss")
    # A step that was never sent before it was rewound away is not there; nothing is there twice.
    assert len(arrived) == len(set(arrived))
    assert set(range(1, everything + 1)) <= set(arrived) <= set(range(1, highest + 1))
    assert server.steps("step_s") == arrived


def test_a_line_without_its_end_waits_for_the_next_call(tmp_path: Path) -> None:
    path, server = tmp_path / "metrics.jsonl", Server()
    path.write_text('{"step": 1, "time_ms": 5, "loss": 0.5}\n{"step": 2, "lo')
    server.run(path)
    assert server.points == {Point("loss", 0.5, 5, 1)}
    with path.open("a") as file:
        file.write('ss": 0.25}\n')
    server.run(path)
    assert server.steps("loss") == [1, 2]


def test_a_missing_file_and_an_unchanged_file_send_nothing(tmp_path: Path) -> None:
    server = Server()
    server.run(tmp_path / "absent.jsonl")
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.log({"loss": 1.0}, 1)
    server.run(log.path)
    before = dict(server.saved)
    assert deliver(log.path, before, lambda points: pytest.fail("sent again"), dict) == 0
