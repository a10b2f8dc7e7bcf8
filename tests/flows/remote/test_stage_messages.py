"""Requests and replies between clones: JSON from outside is checked, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.remote.stage_messages import (
    StageReply,
    StageRequest,
    WorkerRefused,
    as_json,
    keep_files,
    read_reply,
    read_request,
    without_bulk,
)


def test_a_reply_cannot_write_outside_the_records(tmp_path: Path) -> None:
    for name in ("../evil", "dvc.yaml", "runs/../evil", "/etc/evil", ""):
        with pytest.raises(ValueError, match="not below runs/"):
            keep_files(tmp_path, {"runs/good": "YQ==", name: "YQ=="})
    assert list(tmp_path.iterdir()) == []
    keep_files(tmp_path, {"runs/records/a-1/run.json": "e30="})
    assert (tmp_path / "runs/records/a-1/run.json").read_text() == "{}"


def test_a_request_of_another_protocol_is_refused() -> None:
    with pytest.raises(WorkerRefused, match="protocol 2"):
        read_request({"protocol": 2})
    with pytest.raises(WorkerRefused, match="not a stage request"):
        read_request({"protocol": 1, "shell": "rm"})


REQUEST = {"name": "a", "commit": "c", "params": "value: 1", "protocol": 1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lock": "all"}, "lock: "),
        ({"force": "yes"}, "force: "),
        ({"patience_s": "long"}, "patience_s: "),
        ({"shell": "rm"}, "shell: unexpected"),
        ({"parent": "../../elsewhere"}, "no record id"),
        ({"parent": ".."}, "no record id"),
    ],
)
def test_a_request_with_a_wrong_field_is_one_line_that_names_it(
    wrong: dict[str, Any], said: str
) -> None:
    assert read_request(REQUEST).lock == {}
    with pytest.raises(WorkerRefused, match="not a stage request") as caught:
        read_request(REQUEST | wrong)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"status": "fine"}, {"entry": [1]}, {"files": {"a": 1}}, {"seconds": "1"}, {"x": 1}]
)
def test_a_reply_with_a_wrong_field_is_one_line(wrong: dict[str, Any]) -> None:
    values = as_json(StageReply("ran"))
    assert read_reply(values) == StageReply("ran")
    with pytest.raises(WorkerRefused, match="not a stage's reply: ") as caught:
        read_reply(values | wrong)
    assert "\n" not in str(caught.value)


def test_messages_come_through_json_as_they_were() -> None:
    request = StageRequest("a", "c", "p: 1", {"b": {"outs": []}}, True, "r-1", None, 2)
    assert read_request(json.loads(json.dumps(as_json(request)))) == request
    reply = StageReply("ran", "done", 3, {"outs": []}, {"runs/x": "YQ=="}, "host:/clone")
    assert read_reply(json.loads(json.dumps(as_json(reply)))) == reply


def test_a_reply_that_is_too_big_loses_its_biggest_pictures_and_says_so() -> None:
    files = {
        "runs/records/a-1/run.json": "x" * 50,
        "runs/a/1/samples/step-1.png": "x" * 40,
        "runs/a/1/samples/step-2.png": "x" * 60,
        "runs/a/1/metrics.jsonl": "x" * 10,
    }
    reply = StageReply("ran", "done", files=files)
    assert without_bulk(reply, 160) is reply
    small = without_bulk(reply, 60)
    assert set(small.files) == {"runs/records/a-1/run.json", "runs/a/1/metrics.jsonl"}
    assert small.message == "done; 2 pictures or curves stay in the worker's clone"
    # What a pipeline needs of the run is never left out.
    assert set(without_bulk(reply, 0).files) == {"runs/records/a-1/run.json"}
