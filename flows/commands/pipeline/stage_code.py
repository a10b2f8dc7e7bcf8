"""`ultraflux stage fingerprint`, `stage accept`: what a stage's code means, and keeping results."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.command_line import Json, fail, print_json, project_root

FINGERPRINT_EPILOG = """Examples:

  ultraflux stage fingerprint dit_stage1

  ultraflux stage fingerprint dit_stage1 --modules

Comments, docstrings, formatting and the names of modules are no part of it, nor are settings, which
reach a stage as DVC parameters."""
ACCEPT_EPILOG = """Examples:

  ultraflux stage accept dit_stage1 --why "renamed a local variable in haar.py, values compared"

  ultraflux stage accept dit_stage1 dit_stage2 vae --why "type annotations"

Nothing is computed: dvc.lock gets the new fingerprint beside the old outputs. Commit it. What else
has changed (data, settings, the command) cannot be accepted. `ultraflux stage list` says what is
stale and for which modules."""


def stage_fingerprint(
    name: Annotated[str, typer.Argument(help="Stage in dvc.yaml.")],
    modules: Annotated[
        bool, typer.Option("--modules", help="Also each module that the stage can reach.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the fingerprint of a stage's code: what all modules that it can reach mean."""
    from components.files.code_identity import STAGES, CodeIdentity

    identity = CodeIdentity(project_root())
    known = identity.stages()
    if name not in known:
        raise fail(f"no stage '{name}' in flows/stages; stages: {', '.join(known)}")
    try:
        found = identity.fingerprint(f"{STAGES}.{name}")
    except SyntaxError as problem:
        raise fail(f"{problem.filename}:{problem.lineno}: {problem.msg}") from None
    own = identity.own_hashes(f"{STAGES}.{name}")
    if as_json:
        print_json({"stage": name, "fingerprint": found, "modules": own})
        return
    print(found)
    if modules:
        for module, digest in own.items():
            print(f"{digest[:16]}  {module}")


def stage_accept(
    names: Annotated[list[str], typer.Argument(help="Stages in dvc.yaml, in any order.")],
    why: Annotated[
        str, typer.Option(help="Why the results still hold: kept in records, MLflow and lineage.")
    ],
) -> None:
    """Keep results of stages whose code has changed, because a person vouches for them."""
    from flows.history.acceptance import NotAcceptable, accept_code
    from flows.versioning.graph import GraphError

    root = project_root()
    for name in names:
        try:
            done = accept_code(root, name, why)
        except (GraphError, NotAcceptable) as problem:
            raise fail(str(problem)) from None
        except SyntaxError as problem:
            raise fail(f"{problem.filename}:{problem.lineno}: {problem.msg}") from None
        made_by = done.maker or "no run that this clone knows of"
        print(f"{name}: the result of {made_by} stands; accepted {done.changed}")
    print("dvc.lock has changed: commit it. `ultraflux sync` tells MLflow.")
