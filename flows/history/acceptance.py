"""Results kept across a change of code that a person vouches for.

The fingerprint of a stage's code errs on the safe side: a renamed local variable is another
program. Where somebody knows that an edit changes no result, `ultraflux stage accept` puts the new
fingerprint into dvc.lock beside the old outputs. Who vouched, why, and for which modules stays with
the run that made the outputs: in the records, as a tag of that run in MLflow, and in its lineage.
"""

from __future__ import annotations

import getpass
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from components.corpus.listing.source_files import printable
from flows.records.programs import dvc, git_answer
from flows.records.records import (
    ACCEPTED_TAG,
    MAKER_TAG,
    Record,
    RunDescription,
    RunResult,
    all_records,
    maker_of,
    open_record,
)
from flows.versioning import graph as versioning
from flows.versioning.code_files import CODE, CodeChanges, code_path, code_texts
from flows.versioning.lock_hashes import dep_hashes, out_hashes

_STAGE_TAG = "ultraflux.stage"


class NotAcceptable(ValueError):
    """The result cannot be vouched for; one line: why, and what to do."""


@dataclass(frozen=True)
class Acceptance:
    """What was accepted."""

    stage: str
    changed: str
    """Which of its code, as `ultraflux stage list` says it."""
    why: str
    record: Record
    maker: str
    """Record id of the run that made the outputs; empty where this clone has none."""


def accept_code(root: Path, name: str, why: str) -> Acceptance:
    """Let a stage's result stand for the code as it is now.

    Args:
        root: the clone.
        name: the stage.
        why: the reason, for those who come later.

    Raises:
        NotAcceptable: nothing to accept, or more than the code has changed.
        versioning.GraphError: no such stage.
    """
    if not why.strip():
        raise NotAcceptable("--why is empty: say why the result still holds")
    # Refuses an unknown name.
    versioning.stages_until(root, name)
    entry = versioning.lock_entry(root, name)
    if entry is None or name == CODE:
        raise NotAcceptable(f"{name}: has no result to keep; `ultraflux run --until {name}`")
    changed = CodeChanges(root).since(name, entry, versioning.cache_folder(root))
    if not changed:
        raise NotAcceptable(f"{name}: its code means what it meant; there is nothing to accept")
    # `dvc commit` would take every change into the lock, not only the one that was vouched for.
    others = versioning.changes_beside_code(root, name)
    if others:
        raise NotAcceptable(
            f"{name}: more than its code has changed ({others}); run it, or bring that back first"
        )
    # The fingerprint has to be in its file before it can be committed as a dependency.
    dvc(root, "repro", "-s", CODE, failure=NotAcceptable)
    dvc(root, "commit", "-f", name, failure=NotAcceptable)
    outputs = out_hashes(entry)
    _check(root, name, outputs)
    made_by = maker_of(root, name, outputs)
    maker = made_by.record_id if made_by is not None else ""
    record = _record(root, name, changed, why.strip(), maker, outputs)
    return Acceptance(name, changed, why.strip(), record, maker)


def _check(root: Path, name: str, outputs: dict[str, str]) -> None:
    """The lock has the new code and the old outputs, or somebody wrote them in between."""
    entry = versioning.lock_entry(root, name) or {}
    fingerprint = json.loads(code_texts(root)[name])["fingerprint"]
    written = json.loads((root / code_path(name)).read_text(encoding="utf-8"))["fingerprint"]
    if out_hashes(entry) != outputs or written != fingerprint:
        raise NotAcceptable(
            f"{name}: outputs or code changed while they were accepted; look at `git diff "
            "dvc.lock`, and run it again"
        )


def _record(
    root: Path, name: str, changed: str, why: str, maker: str, outputs: dict[str, str]
) -> Record:
    line = f"{datetime.now(UTC).date()} {_person(root)}: {why} ({changed})"
    path = code_path(name)
    inputs = dep_hashes(versioning.lock_entry(root, name) or {})
    run = RunDescription(
        kind="acceptance",
        name=f"accept-{name}",
        tags={_STAGE_TAG: name, MAKER_TAG: maker, ACCEPTED_TAG: line},
        inputs={path: inputs.get(path, "")},
    )
    record = open_record(root, run)
    record.set_outputs(outputs)
    record.finish(RunResult(status="FINISHED", summary=line))
    return record


def _person(root: Path) -> str:
    return printable(git_answer(root, "config", "user.name") or getpass.getuser())


def accepted_lines(root: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], str]:
    """Reasons by (stage, its outputs' hashes), those of one result in the order of time."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}
    for record in all_records(root):
        if record.run.kind == "acceptance":
            key = (record.run.tags[_STAGE_TAG], tuple(sorted(record.outputs.items())))
            line = record.run.tags[ACCEPTED_TAG]
            found[key] = f"{found[key]}\n{line}" if key in found else line
    return found
