"""What a profile takes from elsewhere and a clone does not have, and what it can do without it.

Profiles for real weights read tables of scores, a detector and a loss that no clone ships; for
photographs of one's own their absence would end a run a stage at a time, after hours.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from components.corpus.folder_survey import FolderSurvey, Proposal
from components.settings.schema import Settings


def propose_means(found: FolderSurvey, settings: Settings, proposal: Proposal, root: Path) -> None:
    """Propose what works here in place of what is not here.

    Args:
        found: survey of the folder.
        settings: of the profile to start from.
        proposal: is added to.
        root: paths in settings are below it.
    """
    _propose_scorers(settings, proposal, root)
    _propose_detectors(settings, proposal, root)
    _propose_captioning(found, settings, proposal)
    loss = settings.vae.loss
    # Without its digest the backbone is refused, too.
    usable = _is_there(loss.lpips_backbone, root) and loss.lpips_sha256 and find_spec("lpips")
    if loss.perceptual_kind == "lpips" and not usable:
        proposal.set(
            "vae",
            "loss",
            {"perceptual_kind": "gmsd", "lpips_backbone": None},
            "LPIPS needs the extra lpips, and its backbone with vae.loss.lpips_sha256",
        )


def _is_there(table: str | None, root: Path) -> bool:
    return table is not None and (root / table).is_file()


def _propose_scorers(settings: Settings, proposal: Proposal, root: Path) -> None:
    """Scores made elsewhere are of other photographs; rules on their scale go with them."""
    quality, rules = settings.quality, settings.select
    if _is_there(quality.scores, root):
        return
    human: dict[str, Any] = {}
    why = f"there is no table {quality.scores}; Q-Align and ArtiMuse need their weights"
    if quality.scorer == "table":
        proposal.set("quality", "scorer", "classical", why)
        if rules.min_quality is not None:
            text = f"{rules.min_quality:g} is meant for Q-Align's scale"
            proposal.set("select", "min_quality", None, text)
        human["min_quality"] = None
    if quality.aesthetic_scorer == "table":
        proposal.set("quality", "aesthetic_scorer", "classical", why)
        if rules.aesthetic_top_fraction < 1:
            text = "no share of photographs is dropped by a classical index"
            proposal.set("select", "aesthetic_top_fraction", 1.0, text)
        human["aesthetic_top_fraction"] = None
    if any(getattr(rules.human, key) is not None for key in human):
        proposal.set("select", "human", human, "the same for photographs of people")


def _propose_detectors(settings: Settings, proposal: Proposal, root: Path) -> None:
    people = settings.people
    if people.detector == "table" and not _is_there(people.boxes, root):
        why = f"there is no table {people.boxes}"
        proposal.set("people", "detector", "classical", why)
        proposal.set("people", "boxes", None, why)
    if people.nsfw.scorer != "nudenet" or find_spec("nudenet") is not None:
        return
    if (root / "weights" / "nsfwjs").is_dir():
        scorer = {"scorer": "nsfwjs"}
        proposal.set("people", "nsfw", scorer, "nudenet is not installed, weights/nsfwjs is there")
        return
    why = "nudenet is not installed; `ultraflux weights get nsfwjs` fetches another scorer"
    proposal.set("people", "nsfw", {"scorer": "none"}, why)
    if settings.select.max_nsfw is not None:
        proposal.set("select", "max_nsfw", None, "nothing scores it")


def _propose_captioning(found: FolderSurvey, settings: Settings, proposal: Proposal) -> None:
    """Endpoints cost money: they are not asked where every photograph brings its caption."""
    caption = settings.caption
    if "endpoint" not in (caption.provider, caption.translate.provider):
        return
    if found.captioned >= found.photographs:
        why = "every photograph brings a caption"
        if caption.provider == "endpoint":
            proposal.set("caption", "provider", "shipped", why)
        own = {"provider": "shipped"}
        proposal.set("caption", "translate", own, "Chinese is kept where it came along")
    elif (missing := caption.missing_prices()) is not None:
        proposal.remarks.append(f"before a run: {missing}")
