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

from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.runner import StageOutcome

DESCRIPTION = "Outcome of the stage"


def publish_outcome(outcome: StageOutcome) -> None:
    """Attach `outcome` to the flow run that this process executes."""
    row = asdict(outcome) | {"log": str(outcome.log) if outcome.log else None}
    create_table_artifact(table=[row], description=DESCRIPTION)


def read_outcome(client: SyncPrefectClient, flow_run_id: UUID) -> StageOutcome | None:
    """What the newest attempt of a flow run said; None when it never came to an end."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id])),
        limit=200,
    )
    ours = [artifact for artifact in found if artifact.description == DESCRIPTION]
    if not ours:
        return None
    newest = max(ours, key=lambda artifact: str(artifact.created))
    row: dict[str, Any] = json.loads(str(newest.data))[0]
    return StageOutcome(**row | {"log": Path(row["log"]) if row["log"] else None})
