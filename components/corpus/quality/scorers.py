"""The one table of scorers: the names that `quality.scorer` and `aesthetic_scorer` may hold.

A new scorer is one module and one entry of `SCORERS`. Settings of its own go in a `Section` named
in the entry; params.yaml gives their values under `quality.NAME`.

No numpy and no pandas on import: the settings read this table to check a name, and so does every
command. An opener imports its module when its scorer is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.corpus.quality.kinds import Kind

if TYPE_CHECKING:
    import pandas as pd

    from components.corpus.quality.scorer import DerivativeScorer, Opened, ScoringJob
    from components.settings.corpus import QualitySettings
    from components.settings.section import Section


@dataclass(frozen=True)
class Scorer:
    """An entry of the table."""

    open: Callable[[ScoringJob, Kind], Opened]
    """Looks at weights or server at once, so that their absence costs no score."""
    kinds: tuple[Kind, ...]
    """What it can be named for."""
    score_range: tuple[float, float] | None
    """Lowest and highest score; None: whatever the table holds."""
    needs: str | None = None
    """The field of `quality` that must be set: where weights, server or table are."""
    settings: type[Section] | None = None
    """Class of the section `quality.NAME`; None: it has none of its own."""


def _classical(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    from components.corpus.quality.classical import open_scorer

    return open_scorer(job, kind)


def _table(job: ScoringJob, kind: Kind) -> pd.DataFrame:
    from components.corpus.quality.external import open_scorer

    return open_scorer(job, kind)


def _qalign(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    from components.corpus.quality.qalign import open_scorer

    return open_scorer(job, kind)


def _artimuse(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    from components.corpus.quality.artimuse import open_scorer

    return open_scorer(job, kind)


SCORERS: Mapping[str, Scorer] = {
    "classical": Scorer(_classical, ("quality", "aesthetic"), (0.0, 1.0)),
    "table": Scorer(_table, ("quality", "aesthetic"), None, needs="scores"),
    "qalign": Scorer(_qalign, ("quality",), (1.0, 5.0), needs="qalign_weights"),
    "artimuse": Scorer(_artimuse, ("aesthetic",), (0.0, 100.0), needs="artimuse_url"),
}


def chosen_scorers(settings: QualitySettings) -> dict[Kind, str]:
    """The scorer that the settings name for each kind."""
    return {"quality": settings.scorer, "aesthetic": settings.aesthetic_scorer}
