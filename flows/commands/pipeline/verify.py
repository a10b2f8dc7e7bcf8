"""The command `ultraflux verify`: signed files, checked without any network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.command_line import fail

EPILOG = """Examples:

  ultraflux verify certificates/1a2b3c4d5e6f.json

  ultraflux verify certificates/1a2b3c4d5e6f.json --key our-public-key.pem

A signature says that nothing was changed since and which key signed. Whose key it is you have to
know: give it with --key. Exit code 1: changed, or signed by another key."""


@dataclass
class Verdict:
    """What was found of one file."""

    kind: str
    problems: list[str] = field(default_factory=list)
    """Empty: unchanged, and signed by the key that was asked for, if one was."""
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was compared beyond the file."""


def verify(
    file: Annotated[Path, typer.Argument(help="A certificate of `ultraflux corpus forget`.")],
    key: Annotated[
        Path | None, typer.Option(help="PEM file with the public key that must have signed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check a signed file offline: unchanged, by which key, and what it says."""
    from components.files.signatures import KeyUnusable, public_key

    if not file.is_file():
        raise fail(f"{file}: no such file")
    try:
        wanted = None if key is None else public_key(key)
    except KeyUnusable as problem:
        raise fail(str(problem)) from None
    found = _certificate(file, wanted)
    if as_json:
        document = {"file": str(file), "valid": not found.problems, **found.__dict__}
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _show(file, found)
    raise typer.Exit(1 if found.problems else 0)


def _show(file: Path, found: Verdict) -> None:
    print(f"{file}: {found.kind}")
    for name, value in found.facts.items():
        print(f"  {name}: {value}")
    for note in found.notes:
        print(f"  {note}")
    for problem in found.problems:
        print(f"  CHANGED: {problem}")
    if not found.problems:
        print("  valid: nothing was changed since it was signed")


def _certificate(file: Path, wanted: bytes | None) -> Verdict:
    from components.files.signatures import StatementInvalid, checked, fingerprint

    found = Verdict("certificate")
    try:
        statement, public = checked(file.read_text(encoding="utf-8"))
    except (StatementInvalid, UnicodeDecodeError) as problem:
        found.problems.append(str(problem))
        return found
    found.facts["signed by"] = statement.get("signed_with", f"key {fingerprint(public)}")
    if wanted is not None and wanted != public:
        found.problems.append(f"signed by key {fingerprint(public)}, not by {fingerprint(wanted)}")
    _describe(statement, found)
    return found


def _describe(statement: dict[str, Any], found: Verdict) -> None:
    """What a certificate says, and whether the clone around here agrees."""
    from flows import environment
    from flows.history.forgetting_certificate import FORMAT, VERSION, differences

    if (statement.get("format"), statement.get("version")) != (FORMAT, VERSION):
        found.problems.append(f"no {FORMAT} of version {VERSION}")
        return
    forgotten = statement["forgotten"]
    found.facts |= {
        "issued": statement["issued"],
        "forgotten": ", ".join(f"{e['kind']} {e['value']}" for e in forgotten["entries"]),
        "photographs": len(forgotten["images"]),
        "equal to a run without them": statement["equal_to_a_run_without_them"],
    }
    for one in statement["weights"]:
        found.facts[one["path"]] = f"sha256 {one['sha256']}"
    try:
        root = environment.project_root()
    except FileNotFoundError:
        found.notes.append("not in a project: the certificate alone was checked")
        return
    apart = differences(root, statement)
    found.notes += apart or ["the weights and slices of this clone are the certificate's"]
