"""`ultraflux new FOLDER`: a profile for a folder of photographs, and what will survive it."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.telemetry.wording import legible
from flows.commands.command_line import fail, project_root, refusing

if TYPE_CHECKING:
    from components.corpus.folder_survey import FolderSurvey, Proposal
    from components.settings.schema import Settings

EPILOG = (
    "Example: [bold]ultraflux new ~/photos[/] writes conf/profiles/photos.yaml; then "
    "[bold]ultraflux config compose --profile photos[/] and [bold]ultraflux run --until slices[/]."
)


def new(
    folder: Annotated[Path, typer.Argument(help="Folder of photographs.")],
    profile: Annotated[
        str,
        typer.Option(help="Profile to start from: embedded, consumer-24gb, single-gpu or paper."),
    ] = "embedded",
    name: Annotated[
        str | None, typer.Option(help="Name of the new profile (default: the folder's).")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a profile of that name.")] = False,
) -> None:
    """Write settings for a folder of photographs, and say how many survive which rule."""
    if not folder.is_dir():
        raise fail(f"{folder}: no such folder; give a folder of photographs")
    from components.corpus.folder_survey import local_captioner, propose, survey
    from components.corpus.listing.source_files import refuse_project
    from components.corpus.missing_means import propose_means
    from components.settings.schema import parse_settings
    from flows.versioning.profiles import changed_values, composed, derived_profile

    root = project_root()
    name = name or _profile_name(folder.resolve().name)
    target = root / "conf" / "profiles" / f"{name}.yaml"
    with refusing(ValueError, OSError):
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ValueError(f"--name {name}: choose letters, digits, dots and dashes")
        if target.exists() and not force:
            raise ValueError(
                f"conf/profiles/{name}.yaml exists already; choose another --name, or --force"
            )
        refuse_project(folder, root, str(folder))
        settings = parse_settings(composed(root, profile), where=f"conf/profiles/{profile}.yaml")
        found = survey(
            folder,
            attribution="ATTRIBUTION.csv",
            captions=settings.caption.file,
            captioner=local_captioner(root),
        )
        proposal = propose(found, settings, _source(folder, root))
        propose_means(found, settings, proposal, root)
        text = derived_profile(root, profile, proposal.settings, proposal.remarks)
        values = changed_values(composed(root, profile), proposal.settings)
        changed = parse_settings(values, where=name)
    target.write_text(text, encoding="utf-8")
    _say(found, proposal, changed)
    print(
        f"\nWritten: {target.relative_to(root)}\n"
        f"Next: ultraflux config compose --profile {name} && ultraflux run --until slices"
    )


def _profile_name(folder: str) -> str:
    """A folder's name in letters, digits and dashes; accents are left out, not the letters."""
    plain = unicodedata.normalize("NFKD", folder).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "photos"


def _source(folder: Path, root: Path) -> str:
    """Relative to the project when inside it, else absolute."""
    place = Path(os.path.abspath(folder))
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else place.as_posix()


def _say(found: FolderSurvey, proposal: Proposal, settings: Settings) -> None:
    from components.corpus.folder_survey import advice, expected, survivors

    counted = ", ".join(f"{number:,} {ending}" for ending, number in found.endings.items())
    print(legible(f"{found.folder}: {counted}"))
    for remark in proposal.remarks:
        print(f"  {legible(remark)}")
    counts = survivors(found, settings)
    rejected = ", ".join(
        f"{reason.removeprefix('rejected_')} {number}"
        for reason, number in counts.items()
        if number and reason.startswith("rejected_")
    )
    print(
        f"Of {counts['candidates']} measured {counts['kept']} pass the rules that look at one "
        f"picture alone ({rejected or 'none rejected'}): about {expected(found, settings):,.0f} of "
        f"{found.photographs:,} will be left with a caption"
    )
    for line in advice(found, settings):
        print(f"  {legible(line)}")
