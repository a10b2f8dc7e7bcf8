"""What a pipeline asks of a stage's worker in another clone, and what comes back: JSON, checked."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from components.files.whole_files import write_bytes
from components.settings.field_errors import first_error

PROTOCOL = 1
ReplyStatus = Literal["ran", "skipped", "failed", "refused", "unpushed", "busy"]
_STRICT = ConfigDict(extra="forbid", strict=True)
_RECORD_ID = re.compile(r"[\w.-]*")


@dataclass(frozen=True)
class StageRequest:
    """What a worker is asked to do."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    commit: str
    """Commit at which the worker's clone must be."""
    params: str
    """Text of params.yaml."""
    lock: dict[str, Any] = field(default_factory=dict)
    """Entries of dvc.lock by stage: all that the stage stands on, and its own last one."""
    force: bool = False
    parent: str = ""
    """Record id of the pipeline run."""
    parent_run: str | None = None
    """Its run id in MLflow, where the worker can reach the same server: with MLFLOW_TRACKING_URI
    set, the worker sends curves there while it runs."""
    patience_s: float | None = None
    """How long to wait for the worker's clone; None: until it is free."""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class StageReply:
    """How it went."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    status: ReplyStatus
    """`unpushed`: it ran and its results are safe in this clone, but the remote is away. `busy`:
    another run had the clone for as long as the request may wait."""
    message: str = ""
    seconds: float = 0.0
    entry: dict[str, Any] | None = None
    """The stage's entry of dvc.lock, once its outputs are in the remote."""
    files: dict[str, str] = field(default_factory=dict)
    """The run's record: base64 by path below the repository root."""
    where: str = ""
    """Machine and clone that answered, for people."""
    protocol: int = PROTOCOL


class WorkerRefused(RuntimeError):
    """This clone cannot answer the request; one line."""


def read_request(values: Mapping[str, Any]) -> StageRequest:
    """A request from its JSON.

    Raises:
        WorkerRefused: another protocol, or fields that this one does not have.
    """
    if values.get("protocol") != PROTOCOL:
        raise WorkerRefused(
            f"the request speaks protocol {values.get('protocol')}, this clone {PROTOCOL}: bring "
            "both to one commit"
        )
    request = _read(StageRequest, values, "a stage request")
    # It becomes part of a path here.
    if not _RECORD_ID.fullmatch(request.parent) or set(request.parent) == {"."}:
        raise WorkerRefused(f"not a stage request: parent: {request.parent!r} is no record id")
    return request


_Message = TypeVar("_Message", StageRequest, StageReply)


def _read(kind: type[_Message], values: Mapping[str, Any], what: str) -> _Message:
    """A message from outside, with every field checked.

    Raises:
        WorkerRefused: a field is missing, unknown or of another type.
    """
    try:
        # As JSON: strict means there that a text is no number, not that a mapping is no dataclass.
        return TypeAdapter(kind).validate_json(json.dumps(dict(values)))
    except ValidationError as problem:
        raise WorkerRefused(f"not {what}: {first_error(problem)}") from None


def keep_files(root: Path, files: Mapping[str, str]) -> None:
    """Write a reply's files into the pipeline's clone.

    Raises:
        ValueError: a path that leads out of `runs/` (nothing is written), or data not in base64.
    """
    for name in files:
        path = PurePosixPath(name)
        if path.parts[:1] != ("runs",) or ".." in path.parts or path.name.startswith("."):
            raise ValueError(f"a worker's reply names {name!r}, which is not below runs/")
    # The result last: the uploader takes a record with a result for complete.
    for name in sorted(files, key=lambda name: name.endswith("/result.json")):
        path = PurePosixPath(name)
        target = root / path
        if path.name == "mlflow.json" and target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, base64.b64decode(files[name]), contended=True)


def without_bulk(reply: StageReply, limit_bytes: int) -> StageReply:
    """The reply with its biggest pictures and curves left out until the files fit into a limit.

    Args:
        reply: what a stage's worker answers.
        limit_bytes: of the encoded files together.

    Returns:
        The reply; records themselves stay, and the message says how many files did not.
    """
    spare = sorted(
        (name for name in reply.files if "records" not in PurePosixPath(name).parts[:2]),
        key=lambda name: (len(reply.files[name]), name),
    )
    kept = dict(reply.files)
    while spare and sum(map(len, kept.values())) > limit_bytes:
        del kept[spare.pop()]
    left_out = len(reply.files) - len(kept)
    if not left_out:
        return reply
    message = f"{reply.message}; {left_out} pictures or curves stay in the worker's clone"
    return replace(reply, files=kept, message=message)


def as_json(message: StageRequest | StageReply) -> dict[str, Any]:
    """A request or reply as JSON values."""
    return asdict(message)


def read_reply(values: Mapping[str, Any]) -> StageReply:
    """A reply from its JSON.

    Raises:
        WorkerRefused: another protocol, or fields that this one does not have.
    """
    if values.get("protocol") != PROTOCOL:
        raise WorkerRefused(f"the worker answered in protocol {values.get('protocol')}")
    return _read(StageReply, values, "a stage's reply")
