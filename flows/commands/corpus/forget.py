"""The command `ultraflux corpus forget`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.telemetry.wording import few, time_text
from flows.commands.command_line import Json, fail, print_json, project_root, refusing, silenced

if TYPE_CHECKING:
    from components.corpus.selection.rights import Exclusion
    from components.files.signatures import SigningKey
    from flows.history.affected import Affected

EPILOG = """Examples:

  ultraflux corpus forget --photographer "Ann Lee"

  ultraflux corpus forget --list removals.csv --why "asked on 2026-11-29" --rebuild

Without --rebuild nothing is changed. With it the entries join the list of select.exclusions, the
ordinary pipeline trains what descends from the photographs anew, versions of the old weights lose
their aliases in MLflow, and a signed certificate is written (`ultraflux verify` checks it)."""

CERTIFICATES = Path("certificates")
_SAID = 3
"""Names that are not known, each in a line; a list of the wrong kind has hundreds."""


def forget(
    photographer: Annotated[
        list[str] | None, typer.Option(help="By name, upper and lower case alike; repeatable.")
    ] = None,
    identity: Annotated[
        list[str] | None, typer.Option(help="A photograph's sha256 or its path in the manifest.")
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="Of an image, its page or its photographer.")
    ] = None,
    host: Annotated[list[str] | None, typer.Option(help="All from a host and below it.")] = None,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--list",
            help="A CSV with the columns kind and value, or a name, address or sha256 a line.",
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="Kept beside each entry of the list.")] = "",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Do it: exclude, train anew, certify.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="Where to write it (default: below certificates/).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what photographs went into and what leaving them out costs; with --rebuild, do it."""
    from components.corpus.selection.rights import Exclusions, add_exclusions
    from components.files.signatures import signing_key
    from components.settings.schema import load_settings
    from flows.history.affected import affected_by
    from flows.history.run_evidence import Evidence
    from flows.tracking.tier import services_dir

    root = project_root()
    named = {"photographer": photographer, "identity": identity, "url": url, "host": host}
    with refusing(ValueError, FileNotFoundError):
        settings = load_settings(root / "params.yaml")
        entries = _entries(named, listed, why)
        # Before hours of training: a certificate that nobody can sign is found out now.
        key = signing_key(services_dir(root) / "signing") if rebuild else None
        evidence = Evidence(root)
        affected = affected_by(evidence, Exclusions(entries))
    if not affected.images:
        raise fail(_nobody(root, entries), 1)
    numbers = zip(entries, affected.photographs_by_entry, strict=True)
    if unknown := [entry for entry, number in numbers if not number]:
        # A certificate would call somebody forgotten who was never looked for.
        if rebuild:
            raise fail(f"{_nobody(root, unknown)}\nnothing was changed: leave them out", 1)
        for line in _nobody(root, unknown).splitlines():
            print(f"warning: {line}", file=sys.stderr)
    if key is None:
        if as_json:
            print_json(affected.to_json())
        else:
            _show(affected)
            print("Nothing was changed. With --rebuild: exclude, train anew, certify.")
        return
    with refusing(ValueError):
        add_exclusions(root / settings.select.exclusions, entries)
    if not as_json:
        _show(affected)
    with silenced(as_json):
        _rebuild(root)
    written = _certify(root, entries, affected, key, certificate)
    retired = _retire(root, affected, written)
    if as_json:
        document = {"certificate": str(written), "retired": retired, **affected.to_json()}
        print_json(document)
        return
    for line in retired:
        print(f"retired: {line}")
    print(f"Certificate: {written}, signed with {key.title}")
    print(f"Check it:    ultraflux verify {written}")


def _entries(named: dict[str, list[str] | None], listed: Path | None, why: str) -> list[Exclusion]:
    from components.corpus.selection.rights import exclusion

    found = [
        exclusion(kind, value, why, f"--{kind}")
        for kind, values in named.items()
        for value in values or []
    ]
    if listed is not None:
        found += _read_list(listed, why)
    if not found:
        raise ValueError("name somebody: --photographer, --identity, --url, --host or --list FILE")
    return found


def _read_list(path: Path, why: str) -> list[Exclusion]:
    from components.corpus.selection.rights import exclusion, parse_exclusions
    from components.corpus.written_tables import written_columns
    from components.files.whole_files import regular_bytes

    try:
        text = regular_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--list {path}: cannot be read ({problem})") from None
    if {"kind", "value"} <= set(written_columns(text)):
        entries = parse_exclusions(text, str(path))
        return [e if e.why else exclusion(e.kind, e.value, why, str(path)) for e in entries]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        value = line.strip()
        if not value:
            continue
        kind = "photographer"
        if re.fullmatch(r"[0-9A-Fa-f]{64}", value):
            kind = "identity"
        elif "://" in value:
            kind = "url"
        found.append(exclusion(kind, value, why, f"{path} line {number}"))
    return found


def _nobody(root: Path, entries: list[Exclusion]) -> str:
    """What was meant, perhaps."""
    import difflib

    from components.corpus.manifest import read_table
    from components.corpus.selection.why import meant
    from flows.history.affected import INGESTED

    table = read_table(root / INGESTED, ["photographer", "uri"])
    names = sorted(set(table["photographer"].dropna()))
    lines = []
    for entry in entries[:_SAID]:
        close = difflib.get_close_matches(entry.value, names, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        # A path; a sha256 is near to none.
        if entry.kind == "identity" and Path(entry.value).suffix:
            hint = meant(Path(entry.value).name, table["uri"])
        value = entry.value if len(entry.value) <= 80 else entry.value[:77] + "..."
        lines.append(f"{entry.kind} {value!r}: no photograph in {INGESTED}{hint}")
    if len(entries) > _SAID:
        lines.append(f"and {len(entries) - _SAID} more without a photograph")
    return "\n".join(lines)


def _show(affected: Affected) -> None:
    slices = ", ".join(f"{name} {n}" for name, n in affected.slices.items() if n) or "none"
    print(f"photographs  {len(affected.images)}: {_few(affected.paths)}")
    print(f"slices       {slices}")
    print(f"runs         {len(affected.runs)}: {_few(affected.runs)}")
    print(f"weights      {len(affected.weights)}")
    for digest, part in affected.weights.items():
        print(f"             {digest[:16]}  {part}")
    print(f"checkpoints  {len(affected.checkpoints)}: {_few(affected.checkpoints)}")
    print(f"models       {_few([known.title for known in affected.versions])}")
    print(f"pictures     {len(affected.pictures)}: {_few(affected.pictures)}")
    if affected.look_alikes:
        print(f"look-alikes  {_few(affected.look_alikes)}")
        print("             near duplicates credited to others, which may take their place")
    if affected.unknown:
        print(f"not asked    {_few(affected.unknown)}: `dvc fetch` brings what is not here")
    stages = ", ".join(f"{name} {time_text(hours)}" for name, hours in affected.stages.items())
    print(f"a rebuild    {time_text(affected.hours)} of stages ({stages})")


def _few(names: list[str]) -> str:
    return few(names, 4) or "none"


def _rebuild(root: Path) -> None:
    """The ordinary pipeline; training begins at step 0, since a state knows the photographs."""
    from components.settings.schema import SettingsError
    from flows.pipeline.pipeline_run import run_pipeline
    from flows.pipeline.preflight import PipelineRefused
    from flows.running.training_state import CONTINUE_FROM, RESTART
    from flows.versioning.graph import GraphError

    os.environ.pop(CONTINUE_FROM, None)
    os.environ[RESTART] = "1"
    with refusing(SettingsError, PipelineRefused, GraphError):
        summary = run_pipeline(root, engine="local")
    if summary.interrupted:
        raise fail("interrupted; give the same command again", 130)
    failed = [one for one in summary.outcomes.values() if not one.ok]
    # A gate that refuses new weights is an answer about their quality, not about their data.
    trained = [one for one in failed if one.name != "promote"]
    if trained:
        raise fail("\n".join(one.message for one in trained), 1)


def _certify(
    root: Path,
    entries: list[Exclusion],
    before: Affected,
    key: SigningKey,
    certificate: Path | None,
) -> Path:
    from components.files.signatures import signed
    from components.files.whole_files import write_text
    from flows.history.forgetting_certificate import statement
    from flows.history.lock_chain import ChainBroken
    from flows.history.run_evidence import Evidence

    try:
        said = statement(Evidence(root), entries, before)
    except ChainBroken as problem:
        raise fail(f"no certificate: {problem}", 1) from None
    said["signed_with"] = key.title
    text = signed(said, key)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = certificate or root / CERTIFICATES / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, follow=certificate is not None)
    return path


def _retire(root: Path, affected: Affected, certificate: Path) -> list[str]:
    """Titles of the versions of old weights, now without aliases; a server that is away is said."""
    from flows.history.run_evidence import connect
    from flows.tracking.registry import registered_weights, retire

    if not affected.versions:
        return []
    client, problem = connect(root)
    if client is None:
        titles = ", ".join(known.title for known in affected.versions)
        print(
            f"warning: not retired, MLflow is away ({problem}): {titles}; the same command again "
            "retires them",
            file=sys.stderr,
        )
        return []
    why = f"its data was withdrawn, see certificate {certificate.name}"
    done = []
    for known in registered_weights(client):
        if known.digest in affected.weights:
            retire(client, known, why)
            done.append(known.title)
    return done
