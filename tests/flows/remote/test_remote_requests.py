"""The pipeline's clone towards workers: what it believes, and what it answers itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from flows.records.records import RunDescription, open_record
from flows.remote.remote_requests import PipelineClone
from flows.remote.remote_stage import code_commit, run_remote_stage
from flows.remote.stage_messages import StageReply, StageRequest
from flows.running.clone_lock import clone_lock
from flows.versioning import graph as versioning


def test_the_pipelines_own_clone_answers_while_the_pipeline_holds_it(
    toy: Path, share: Path
) -> None:
    record = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    with clone_lock(toy, print):
        params = (toy / "params.yaml").read_text()
        request = StageRequest(
            "a", code_commit(toy), params, parent=record.record_id, patience_s=0.0
        )
        reply = run_remote_stage(request, root=toy)
    assert reply.entry == versioning.read_lock(toy)["a"], reply.message
    assert reply.files == {}
    assert any(share.rglob("*"))


def test_a_reply_that_cannot_be_believed_changes_nothing(toy: Path, share: Path) -> None:
    clone = PipelineClone(
        toy, versioning.stage_graph(toy), parent_record="x", force=False, stopping=lambda: False
    )
    evil = clone.accept("a", StageReply("failed", "x", files={"../evil": "YQ=="}), "worker")
    assert evil.status == "failed"
    assert "not below runs/" in evil.message
    subprocess.run(["dvc", "repro", "-q"], cwd=toy, check=True)
    before = (toy / "dvc.lock").read_bytes()
    entry = json.loads(json.dumps(versioning.read_lock(toy)["c"]))
    entry["deps"][0]["md5"] = "0" * 32
    foreign = clone.accept("c", StageReply("ran", "done", entry=entry), "worker")
    assert foreign.message == "c: worker ran on another version of data/a"
    assert (toy / "dvc.lock").read_bytes() == before
