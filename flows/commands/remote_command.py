"""`ultraflux stage remote`, the worker's end of a pipeline, and `ultraflux remote`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.command_line import fail, project_root

EPILOG = (
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
    from components.settings import SettingsError
    from flows.clones.remote_stage import run_remote_stage
    from flows.clones.stage_messages import StageReply, WorkerRefused, as_json, read_request
    from flows.history.records import write_json
    from flows.versioning import GraphError

    root = project_root()
    try:
        text = sys.stdin.read() if request == "-" else Path(request).read_text(encoding="utf-8")
        asked = read_request(json.loads(text))
        answer = run_remote_stage(asked, root=root)
    except KeyboardInterrupt:
        raise fail("interrupted; what the stage saved stays in this clone", 130) from None
    except (OSError, ValueError, WorkerRefused, SettingsError, GraphError) as problem:
        answer = StageReply("refused", " ".join(str(problem).split()))
    if reply is None:
        json.dump(as_json(answer), sys.stdout)
        print()
    else:
        write_json(reply, as_json(answer))
    if answer.entry is None:
        raise fail(answer.message, 1)


def remote() -> None:
    """Set the DVC remote from ULTRAFLUX_DVC_REMOTE and say which one this clone uses."""
    from flows.clones import data_remote

    try:
        print(f"DVC remote: {data_remote.configure(project_root())}")
    except data_remote.RemoteFailed as problem:
        raise fail(str(problem)) from None
