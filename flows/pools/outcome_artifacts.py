"""How a stage run by a worker tells the pipeline how it went: a table artifact of its flow run.

An artifact goes through the Prefect API, so worker and pipeline need no common result storage; a
person sees the same row on the flow run's page.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import Artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.remote.stage_messages import StageReply, WorkerRefused, as_json, read_reply, without_bulk
from flows.running.stage_runner import StageOutcome

DESCRIPTION = "Outcome of the stage"
REPLY_DESCRIPTION = "Reply of the stage's worker"
REPLY_TYPE = "result"
MOST_REPLY_BYTES = 16 * 2**20
"""Of pictures and curves in a reply: they pass through the Prefect server's database."""


def publish_outcome(outcome: StageOutcome) -> None:
    """Attach `outcome` to the flow run that this process executes."""
    row = asdict(outcome) | {"log": str(outcome.log) if outcome.log else None}
    create_table_artifact(table=[row], description=DESCRIPTION)


def read_outcome(client: SyncPrefectClient, flow_run_id: UUID) -> StageOutcome | None:
    """What the newest attempt of a flow run said; None when it never came to an end."""
    data = _newest(client, flow_run_id, DESCRIPTION)
    if data is None:
        return None
    row: dict[str, Any] = json.loads(data)[0]
    return StageOutcome(**row | {"log": Path(row["log"]) if row["log"] else None})


def publish_reply(reply: StageReply) -> None:
    """Attach a reply to the flow run that this process executes; the pipeline reads it there."""
    sent = without_bulk(reply, MOST_REPLY_BYTES)
    # `create` turns the data into JSON text.
    artifact = Artifact(type=REPLY_TYPE, description=REPLY_DESCRIPTION, data=as_json(sent))
    artifact.create(_sync=True)  # type: ignore[call-arg]


def read_published_reply(client: SyncPrefectClient, flow_run_id: UUID) -> StageReply | None:
    """The reply of a flow run's newest attempt; None when there is none.

    Raises:
        WorkerRefused: it is not a reply as this clone knows them.
    """
    data = _newest(client, flow_run_id, REPLY_DESCRIPTION)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except ValueError:
        raise WorkerRefused("the worker's reply is not JSON") from None
    if not isinstance(values, dict):
        raise WorkerRefused("the worker's reply is not a JSON object")
    return read_reply(values)


def _newest(client: SyncPrefectClient, flow_run_id: UUID, description: str) -> str | None:
    """Data of a flow run's newest artifact with a description."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id])),
        limit=200,
    )
    ours = [artifact for artifact in found if artifact.description == description]
    if not ours:
        return None
    # A flow run that was repeated has an artifact of every attempt.
    return str(max(ours, key=lambda artifact: str(artifact.created)).data)
