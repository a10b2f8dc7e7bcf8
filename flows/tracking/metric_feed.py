"""From a growing JSONL file of metrics to a server, every point once.

What goes into a request is noted in a `state` (part of a record's mlflow.json) before it is sent.
Three things can go wrong, also together, and none loses or doubles a point:

- The server goes away: `deliver` raises, and the next call begins with the noted request.
- The answer of a request is lost, or this process dies before it notes the answer: the same points
  are sent again, and a server ignores a point (key, step, time, value) that it has.
- Training is resumed and rewinds the file: the bytes before the noted position are others, so the
  file is read from its beginning; steps that were sent already are left out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from components.telemetry.metric_log import TIME_KEY

BATCH = 500
"""Points after which a request is sent; MLflow takes at most 1,000."""
_TAIL_BYTES = 256
State = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    ms: int
    """When it was measured, ms since 1970."""
    step: int


def deliver(
    path: Path,
    state: State,
    send: Callable[[list[Point]], object],
    note: Callable[[], object],
) -> int:
    """Send the points of `path` that were not sent yet.

    Args:
        path: metric file; nothing happens while it does not exist. A last line without its end is
            left for the next call.
        state: JSON values `offset`, `tail` (checksum of the bytes before it), `sent` (last step by
            key) and `pending` (points of a request without an answer); brought up to date.
        send: gets at most 1,000 points; what it raises ends the call.
        note: saves the state.

    Returns:
        How many points were sent.
    """
    # First of all, and as it was: the same points in another request could be doubled by half.
    count = _send_pending(state, send, note)
    if not path.is_file():
        return count
    with path.open("rb") as file:
        position = _start(file, state)
        last, more = dict(state.get("sent", {})), True
        while more:
            file.seek(position)
            points: list[Point] = []
            more = False
            for line in file:
                # Training is writing it at this moment.
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                points += _new_points(path, line, last)
                more = len(points) >= BATCH
                if more:
                    break
            if position != state.get("offset", 0):
                pending = [list(astuple(point)) for point in points]
                state.update(
                    offset=position, tail=_tail(file, position), sent=dict(last), pending=pending
                )
                note()
                count += _send_pending(state, send, note)
    return count


def _send_pending(
    state: State, send: Callable[[list[Point]], object], note: Callable[[], object]
) -> int:
    """Send the noted request, if there is one; returns its number of points."""
    pending = [Point(*values) for values in state.get("pending", [])]
    if pending:
        send(pending)
        state["pending"] = []
        note()
    return len(pending)


def _start(file: BinaryIO, state: State) -> int:
    """The noted position, or 0 where the file is no longer the one that it was noted in."""
    offset = int(state.get("offset", 0))
    return offset if offset and _tail(file, offset) == state.get("tail") else 0


def _tail(file: BinaryIO, position: int) -> int:
    """Checksum of the bytes just before `position`; -1 where the file is shorter."""
    begin = max(0, position - _TAIL_BYTES)
    file.seek(begin)
    data = file.read(position - begin)
    return zlib.crc32(data) if len(data) == position - begin else -1


def _new_points(path: Path, line: bytes, last: dict[str, int]) -> list[Point]:
    """Points of one line of `path` beyond the `last` step of their key, which moves on."""
    try:
        row = json.loads(line)
    except ValueError:
        return []  # cut by a kill and written on; the log's own readers leave it out too
    fields = row if isinstance(row, dict) else {}
    step, ms = fields.pop("step", None), fields.pop(TIME_KEY, 0)
    if not isinstance(step, int) or not isinstance(ms, int):
        raise ValueError(f"{path}: a line that is no object with a step: {line[:80]!r}")
    found = [
        Point(key, value, ms, step) for key, value in fields.items() if step > last.get(key, -1)
    ]
    last.update({point.key: step for point in found})
    return found
