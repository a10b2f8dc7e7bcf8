"""Stage `code`: what the code of every stage means, one small file per stage.

Every stage depends on its own file, and on no other code: an edit makes stale exactly the stages
whose results it can change (components/files/code_identity.py says which those are).
"""

from __future__ import annotations

from flows.stages.contract import StageContext, StageResult
from flows.versioning.code_files import write_code_files


def run(context: StageContext) -> StageResult:
    """Write `data/code/<stage>.json` for every stage module."""
    stages = write_code_files(context.root)
    return StageResult(summary=f"fingerprints of {len(stages)} stages")
