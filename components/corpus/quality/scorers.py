"""The scorers that `quality.scorer` and `quality.aesthetic_scorer` may name, one entry each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from components.corpus.quality import artimuse, classical, external, qalign
from components.corpus.quality.scorer import Kind, Scorer
from components.settings.corpus import QualitySettings
from components.settings.schema import SettingsError

SCORERS: Mapping[str, Scorer] = {
    "classical": Scorer(classical.open_scorer, ("quality", "aesthetic"), (0.0, 1.0)),
    "table": Scorer(external.open_scorer, ("quality", "aesthetic"), None, needs="scores"),
    "qalign": Scorer(qalign.open_scorer, ("quality",), (1.0, 5.0), needs="qalign_weights"),
    "artimuse": Scorer(artimuse.open_scorer, ("aesthetic",), (0.0, 100.0), needs="artimuse_url"),
}


def chosen_scorers(settings: QualitySettings) -> dict[Kind, str]:
    """The scorer that the settings name for each kind."""
    return {"quality": settings.scorer, "aesthetic": settings.aesthetic_scorer}


def check_scorers(settings: QualitySettings, *, where: str = "params.yaml") -> None:
    """Refuse what no scorer could start with, before anything is read or loaded.

    The settings room lies below this one and cannot know the table, so the names are checked here.

    Args:
        settings: section `quality`.
        where: file name for messages.

    Raises:
        SettingsError: an unknown scorer, one of the other kind, or one whose setting is missing;
            one line each.
    """
    fields: dict[Kind, str] = {"quality": "quality.scorer", "aesthetic": "quality.aesthetic_scorer"}
    problems = []
    for kind, name in chosen_scorers(settings).items():
        known = [known for known, scorer in SCORERS.items() if kind in scorer.kinds]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            problems.append(
                f"{where}: {fields[kind]} = {name!r}: no such {kind} scorer, known are "
                f"{', '.join(known)}{hint}"
            )
        elif (needs := SCORERS[name].needs) is not None and getattr(settings, needs) is None:
            problems.append(f"{where}: quality.{needs} must be set for {fields[kind]} {name!r}")
    if problems:
        raise SettingsError("\n".join(problems))
