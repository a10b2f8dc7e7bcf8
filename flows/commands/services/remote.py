"""`ultraflux stage remote`, the worker's end of a pipeline, and `ultraflux remote`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.command_line import fail, project_root, refusing

STAGE_EPILOG = (
    "Executors call this: [bold]ssh gpu1 'cd clone && ultraflux stage remote -' < request.json "
    "> reply.json[/]. The request names commit, parameters, lock entries: docs/two_machines.md."
)


def stage_remote(
    request: Annotated[str, typer.Argument(help="File with the request, or - for standard input.")],
    reply: Annotated[
        Path | None, typer.Option(help="Where the reply goes (default: standard output).")
    ] = None,
) -> None:
    """Run one stage in this clone for a pipeline elsewhere; JSON in, JSON out."""
    from flows.records.records import write_json
    from flows.remote.remote_stage import run_remote_stage
    from flows.remote.stage_messages import StageReply, WorkerRefused, as_json, read_request

    root = project_root()
    try:
        asked = read_request(_read_json(request))
        answer = run_remote_stage(asked, root=root)
    except KeyboardInterrupt:
        raise fail("interrupted; what the stage saved stays in this clone", 130) from None
    except (OSError, ValueError, WorkerRefused) as problem:
        answer = StageReply("refused", " ".join(str(problem).split()))
    if reply is None:
        json.dump(as_json(answer), sys.stdout)
        print()
    else:
        write_json(reply, as_json(answer))
    if answer.entry is None:
        raise fail(answer.message, 1)


def _read_json(request: str) -> Any:
    try:
        text = sys.stdin.read() if request == "-" else Path(request).read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"request {request}: cannot read it: {problem.strerror}") from None
    try:
        return json.loads(text)
    except ValueError as problem:
        raise ValueError(f"request {request}: not JSON ({problem})") from None


def remote(
    state: Annotated[
        bool, typer.Option("--state", help="List what is kept of unfinished stages there.")
    ] = False,
    drop_state: Annotated[
        bool,
        typer.Option("--drop-state", help="Remove all of it; no stage may run elsewhere."),
    ] = False,
) -> None:
    """Set the DVC remote from ULTRAFLUX_DVC_REMOTE and say which one this clone uses.

    Checkpoints of stages that run in other clones are copied to it, so that a lost machine costs
    the time since its last checkpoint; what such a stage kept goes when its outputs are pushed.
    """
    from flows.remote import data_remote
    from flows.remote.state_copies import drop_all, kept_copies

    root = project_root()
    with refusing(data_remote.RemoteFailed):
        print(f"DVC remote: {data_remote.configure(root)}")
        for kept in kept_copies(root) if state or drop_state else []:
            name = f"{kept.stage}/{kept.stage_key}"
            print(f"{name:40} {kept.checkpoint or '-':16} {kept.size_bytes / 2**20:.1f} MiB")
        if drop_state:
            drop_all(root)
            print("removed")
