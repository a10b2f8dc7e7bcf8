"""What papers say, read once from the files that the pipeline left behind.

Every number and name has one origin: tables of the slices, JSON of the stages, the model card that
training wrote, the settings. What only the history of a clone knows (commit, dates, run ids) comes
in as `Origin`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import yaml

from components.corpus.manifest_columns import read_columns
from components.corpus.selection.attribution import counted_licenses, read_attribution_file
from components.corpus.selection.rights import is_share_alike, read_exclusions
from components.corpus.selection.slices import DESCRIPTIONS, SLICES
from components.files.weight_folders import file_digest, folder_digest
from components.settings.schema import Settings

_CITATION = "CITATION.cff"


class PapersIncomplete(ValueError):
    """Something that a paper needs was not made yet; one line."""


@dataclass(frozen=True)
class Origin:
    """What the records of a clone know."""

    published: str
    """Day on which the slices were cut, as YYYY-MM-DD."""
    commit: str
    runs: Mapping[str, str]
    """Record or run by stage."""
    packages: Mapping[str, str]
    """Version by name, of the lock that the weights were trained with."""
    lock_sha256: str


@dataclass(frozen=True)
class Slice:
    """One table of the corpus."""

    name: str
    description: str
    path: Path
    sha256: str
    rows: int
    credits: list[dict[str, str]]
    """Rows of its attribution file."""


@dataclass(frozen=True)
class Weights:
    """One folder of weights."""

    name: str
    path: Path
    sha256: str
    stage: str


@dataclass(frozen=True)
class Facts:
    """Everything that papers say."""

    name: str
    origin: Origin
    settings: Settings
    slices: list[Slice]
    weights: list[Weights]
    card: str
    """Text of the model card that training wrote."""
    metrics: dict[str, float]
    decision: dict[str, Any] | None
    selection: dict[str, int]
    captions: list[tuple[str, int]]
    hosts: list[tuple[str, int]]
    photographers: int
    gigapixels: float
    exclusions: int
    citation: str
    software: str
    """Title and version of what made all this."""

    @property
    def corpus_name(self) -> str:
        """Such as "ultraflux-corpus"."""
        return f"{self.name}-corpus"

    @property
    def model_name(self) -> str:
        """Such as "ultraflux-transformer"."""
        return f"{self.name}-transformer"

    @property
    def version(self) -> str:
        """Of the corpus: by its content, so that equal tables have equal versions."""
        digest = hashlib.sha256("".join(one.sha256 for one in self.slices).encode()).hexdigest()
        # Croissant asks for MAJOR.MINOR.PATCH; what follows the plus sign names the build.
        return f"1.0.0+{digest[:12]}"

    @property
    def credits(self) -> list[dict[str, str]]:
        """Attribution of every photograph of the corpus once."""
        found = {row["image_id"]: row for one in self.slices for row in one.credits}
        return list(found.values())

    @property
    def licenses(self) -> list[tuple[str, str, int]]:
        """(licence, address of its text, photographs)."""
        return counted_licenses(self.credits)

    @property
    def share_alike(self) -> int:
        """Photographs whose licence asks for itself."""
        return sum(is_share_alike(row["license_id"]) for row in self.credits)


def read_facts(root: Path, settings: Settings, origin: Origin) -> Facts:
    """Facts of a clone whose pipeline has run.

    Raises:
        PapersIncomplete: a stage has not run.
    """
    folders = {
        "autoencoder": Path("data/vae/autoencoder"),
        "transformer": Path("data/dit_stage2", settings.generate.weights),
    }
    card = root / folders["transformer"] / "README.md"
    needed = [
        *(root / "data/slices" / f"{name}.parquet" for name in SLICES),
        *(root / folder for folder in folders.values()),
        *(root / "data/slices/attribution" / f"{name}.csv" for name in SLICES),
        *(card, root / "data/select/summary.json", root / "data/evaluate/metrics.json"),
    ]
    for path in needed:
        if not path.exists():
            raise PapersIncomplete(f"{path.relative_to(root)} is missing: run `ultraflux run`")
    slices = [_slice(root, name) for name in SLICES]
    rows = read_columns(
        root / "data/slices/manifest.parquet",
        ("megapixels", "photographer", "caption_model", "image_url", "source"),
        kept_only=True,
    )
    citation = (
        yaml.safe_load((root / _CITATION).read_text("utf-8"))
        if (root / _CITATION).is_file()
        else {}
    )
    decision = root / "data/promote/decision.json"
    return Facts(
        name=settings.project.name,
        origin=origin,
        settings=settings,
        slices=slices,
        weights=[
            Weights(name, folder, folder_digest(root / folder), folder.parts[1])
            for name, folder in folders.items()
        ],
        card=card.read_text("utf-8"),
        metrics=json.loads((root / "data/evaluate/metrics.json").read_text("utf-8")),
        decision=json.loads(decision.read_text("utf-8")) if decision.is_file() else None,
        selection=json.loads((root / "data/select/summary.json").read_text("utf-8")),
        captions=_counted(rows["caption_model"], "unknown"),
        hosts=_hosts(rows),
        photographers=int(rows["photographer"].nunique()),
        gigapixels=float(rows["megapixels"].sum()) / 1000,
        exclusions=len(read_exclusions(root / settings.select.exclusions)),
        citation=_citation(citation),
        software=str(citation.get("title", "UltraFlux MLOps")),
    )


def _slice(root: Path, name: str) -> Slice:
    path = Path("data/slices", f"{name}.parquet")
    credits = read_attribution_file(root / "data/slices/attribution" / f"{name}.csv")
    return Slice(name, DESCRIPTIONS[name], path, file_digest(root / path), len(credits), credits)


def _counted(values: pd.Series, missing: str) -> list[tuple[str, int]]:
    counts = Counter(str(value) for value in values.astype(object).fillna(missing))
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def _hosts(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Photographs by the host that they come from; where there is none, by their source."""
    urls = rows["image_url"].astype(object)
    hosts = urls.map(lambda url: urlsplit(url).hostname if isinstance(url, str) else None)
    return _counted(hosts.fillna(rows["source"].astype(object)), "unknown")


def _citation(document: Mapping[str, Any]) -> str:
    """One line of CITATION.cff."""
    authors = ", ".join(str(one.get("name", "")) for one in document.get("authors", []))
    return f"{authors}: {document.get('title', '')}".strip(": ")
