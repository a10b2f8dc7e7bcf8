"""The command `ultraflux verify`: signed files, checked without any network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from components.telemetry.wording import legible
from flows.commands.command_line import Json, fail, print_json, refusing, why_no_file

EPILOG = """Examples:

  ultraflux verify signed/prompt00_256x256.png

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
    file: Annotated[
        Path,
        typer.Argument(help="A signed picture, or a certificate of `ultraflux corpus forget`."),
    ],
    key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of who must have signed: the public key of a certificate's signer, the "
            "root certificate of a picture's."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a signed file offline: unchanged, by which key, and what it says."""
    from components.files.signatures import KeyUnusable, public_key

    if not file.is_file():
        raise fail(f"{file}: {why_no_file(file)}")
    with refusing(KeyUnusable):
        if _is_statement(file):
            found = _certificate(file, None if key is None else public_key(key))
        else:
            found = _picture(file, key)
    if as_json:
        document = {"file": str(file), "valid": not found.problems, **found.__dict__}
        print_json(document)
    else:
        _show(file, found)
    raise typer.Exit(1 if found.problems else 0)


def _show(file: Path, found: Verdict) -> None:
    print(f"{file}: {found.kind}")
    for name, value in found.facts.items():
        print(f"  {legible(name)}: {legible(str(value))}")
    for note in found.notes:
        print(f"  {legible(note)}")
    for problem in found.problems:
        print(f"  CHANGED: {legible(problem)}")
    if not found.problems:
        print("  valid: nothing was changed since it was signed")


def _is_statement(file: Path) -> bool:
    """JSON, by its first character; everything else is looked at as a picture."""
    with file.open("rb") as stream:
        return file.suffix == ".json" or stream.read(1) == b"{"


def _picture(file: Path, key: Path | None) -> Verdict:
    from components.files.content_credentials import read_credentials
    from components.files.signatures import KeyUnusable
    from components.files.whole_files import regular_bytes

    try:
        anchors = _own_root() if key is None else regular_bytes(key).decode("ascii")
    except (OSError, UnicodeDecodeError) as problem:
        raise KeyUnusable(f"--key {key}: no PEM file ({problem})") from None
    found = Verdict("picture")
    credentials = read_credentials(file, anchors)
    if credentials is None:
        found.problems.append("no manifest: never signed, or it was removed")
        return found
    found.problems += credentials.problems
    found.facts["signed by"] = credentials.signer
    lineage = credentials.lineage
    parts, made_with = (_named(lineage, name) for name in ("weights_sha256", "made_with"))
    for name, digest in parts.items():
        found.facts[f"weights of {name}"] = f"sha256 {digest}"
    for name in ("prompt", "seed", "software"):
        if name in made_with:
            found.facts[name] = made_with[name]
    if key is not None and not credentials.is_trusted:
        found.problems.append(f"not signed by a key that {key} vouches for")
    elif key is None:
        own = "this clone's key" if credentials.is_trusted else "a key that is not known here"
        found.notes.append(f"signed with {own}; --key names whom you trust")
    return found


def _named(lineage: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a statement that another program may have written in another form."""
    value = lineage.get(name)
    return value if isinstance(value, dict) else {}


def _own_root() -> str:
    """Certificates of this clone's development key, where there is a clone with one."""
    from components.files.content_credentials import DEVELOPMENT_CHAIN
    from flows import environment
    from flows.tracking.tier import services_dir

    try:
        path = services_dir(environment.project_root()) / "signing" / DEVELOPMENT_CHAIN
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def _certificate(file: Path, wanted: bytes | None) -> Verdict:
    from components.files.signatures import StatementInvalid, checked, fingerprint, key_title

    found = Verdict("certificate")
    try:
        # Of the bytes: reading as text would take another kind of line end for none.
        statement, public = checked(file.read_bytes().decode())
    except (StatementInvalid, UnicodeDecodeError) as problem:
        found.problems.append(str(problem))
        return found
    # What signed it the signature shows; that it is a development key, only the signer can say.
    said = statement.get("signed_with")
    titles = [key_title(public), key_title(public, is_development=True)]
    found.facts["signed by"] = said if said in titles else titles[0]
    if said not in (None, *titles):
        found.problems.append(f"it says that {said} signed it; {titles[0]} did")
    if wanted is not None and wanted != public:
        found.problems.append(f"signed by key {fingerprint(public)}, not by {fingerprint(wanted)}")
    _describe(statement, file, found)
    return found


def _describe(statement: dict[str, Any], file: Path, found: Verdict) -> None:
    """What a certificate says, and whether the clone around here agrees."""
    from flows import environment
    from flows.history.forgetting_certificate import NoCertificate, differences, read_certificate

    try:
        certificate = read_certificate(statement, file)
    except NoCertificate as problem:
        found.problems.append(str(problem))
        return
    forgotten = certificate.forgotten
    found.facts |= {
        "issued": certificate.issued,
        "forgotten": ", ".join(
            f"{entry.kind} {entry.value}" + ("" if number is None else f" ({number})")
            for entry, number in zip_longest(forgotten.entries, forgotten.photographs_by_entry)
            if entry is not None
        ),
        "photographs": len(forgotten.images),
        "equal to a run without them": certificate.equal_to_a_run_without_them,
    }
    for one in certificate.weights:
        found.facts[one.path] = f"sha256 {one.sha256}"
    try:
        root = environment.project_root()
    except FileNotFoundError:
        found.notes.append("not in a project: the certificate alone was checked")
        return
    apart = differences(root, certificate)
    found.notes += apart or ["the weights and slices of this clone are the certificate's"]
