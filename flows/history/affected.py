"""What a set of photographs has gone into: slices, stores, training runs, weights, pictures.

By content, as lineage walks: a run is affected if a table that it read holds one of the photographs
as a kept row, or if another affected run wrote what it read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.manifest import read_table
from components.corpus.selection.rights import Exclusions
from components.corpus.selection.slices import SLICES
from flows.history.lineage import SLICES_DIR, TRAINING, Lineage
from flows.history.operations_plan import duration
from flows.history.run_evidence import Evidence, StageRun
from flows.stages.contract import state_folder
from flows.tracking.registry import RegisteredWeights
from flows.versioning.clone import Clone

INGESTED = "data/ingest/manifest.parquet"
SELECTED = "data/select/manifest.parquet"
_STAGES = ("vae", "latents", "text_embeddings", "dit_stage1", "dit_stage2", "generate")
"""Stages whose outputs are made from photographs of the slices, in the order of the graph."""
_ROW = ("image_id", "uri", "kept", "duplicate_of", "photographer")


@dataclass(frozen=True)
class Affected:
    """Everything of a clone that rests on some photographs."""

    images: list[str]
    """image_id, sorted."""
    paths: list[str]
    slices: dict[str, int]
    """Photographs among them by slice, as the slices are now."""
    look_alikes: list[str]
    """Paths of photographs that were left out as near duplicates of these and may take their
    place; they are credited to others."""
    runs: list[str]
    weights: dict[str, str]
    """Stage and part by sha256."""
    checkpoints: list[str]
    """Folders of training states below the root."""
    versions: list[RegisteredWeights]
    pictures: list[str]
    unknown: list[str]
    """Tables that runs have read and this clone does not hold: their rows could not be asked."""
    stages: dict[str, float] = field(default_factory=dict)
    """Hours of every stage that a rebuild runs again, from past runs or the estimate."""
    photographs_by_entry: list[int] = field(default_factory=list)
    """How many each entry names, in the order of the entries."""

    @property
    def hours(self) -> float:
        """One stage after the other."""
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"hours": self.hours}


def affected_by(evidence: Evidence, exclusions: Exclusions) -> Affected:
    """What the photographs that `exclusions` name have gone into.

    Raises:
        FileNotFoundError: no candidates were ingested yet; one line.
    """
    root = evidence.root
    if not (root / INGESTED).is_file():
        raise FileNotFoundError(f"{INGESTED} is missing: run `ultraflux run --until ingest` first")
    by_entry = exclusions.images_by_entry(root / INGESTED)
    for file in _versions(evidence, INGESTED):
        for known, more in zip(by_entry, exclusions.images_by_entry(file), strict=True):
            known |= more
    images = set().union(*by_entry)
    current = read_table(root / INGESTED, _ROW)
    # Alone: two other photographs may well look alike.
    runs, unknown = affected_runs(evidence, images)
    weights = {
        digest: f"{run.stage}/{part}"
        for run in runs
        if run.stage in TRAINING
        for part, digest in sorted(run.weights().items())
    }
    lineage = Lineage(evidence)
    versions = [known for known in lineage.versions if known.digest in weights]
    pictures = [
        f"{line['file']} ({run.name})"
        for run, line in lineage.generations()
        if set(line["digests"].values()) & set(weights)
    ]
    return Affected(
        images=sorted(images),
        paths=sorted(set(current.loc[current["image_id"].isin(images), "uri"].astype(str))),
        slices=_counts(root, images),
        look_alikes=_look_alikes(root / SELECTED, images),
        runs=[f"{run.stage} {run.name}" for run in runs],
        weights=weights,
        checkpoints=_checkpoints(root, runs),
        versions=versions,
        pictures=sorted(pictures),
        unknown=unknown,
        stages=_cost(evidence) if images else {},
        photographs_by_entry=[len(one) for one in by_entry],
    )


def affected_runs(evidence: Evidence, images: set[str]) -> tuple[list[StageRun], list[str]]:
    """Runs that rest on kept rows of these images, oldest first, and tables that are not here."""
    holds: dict[str, bool] = {}
    unknown: set[str] = set()
    written: set[tuple[str, str]] = set()
    found: list[StageRun] = []
    if not images:
        return [], []

    def is_hit(path: str, md5: str) -> bool:
        if (path, md5) in written:
            return True
        if not (path.startswith(SLICES_DIR) and path.endswith(".parquet")):
            return False
        if md5 not in holds:
            file = evidence.file(path, md5)
            if file is None:
                unknown.add(f"{path} ({md5})")
            holds[md5] = file is not None and bool(kept_rows(file, images))
        return holds[md5]

    # Stage by stage in the order of the graph: what a stage reads is settled before it is asked.
    for stage in _STAGES:
        for run in evidence.runs:
            if run.stage == stage and any(is_hit(path, md5) for path, md5 in run.inputs.items()):
                found.append(run)
                written.update(run.outputs.items())
    return found, sorted(unknown)


def kept_rows(table: Path, images: set[str]) -> int:
    """Rows of a manifest or slice that are kept and show one of these images."""
    rows = read_table(table, ("image_id", "kept"))
    return int((rows["image_id"].isin(images) & rows["kept"].eq(True)).sum())


def _versions(evidence: Evidence, path: str) -> Iterable[Path]:
    """Every version of a table that runs wrote and this clone still holds."""
    for md5 in {run.outputs[path] for run in evidence.runs if path in run.outputs}:
        file = evidence.file(path, md5)
        if file is not None:
            yield file


def _counts(root: Path, images: set[str]) -> dict[str, int]:
    files = {name: root / SLICES_DIR / f"{name}.parquet" for name in SLICES}
    return {name: kept_rows(file, images) for name, file in files.items() if file.is_file()}


def _look_alikes(selected: Path, images: set[str]) -> list[str]:
    if not selected.is_file():
        return []
    rows: pd.DataFrame = read_table(selected, _ROW)
    alike = rows["duplicate_of"].isin(images) & ~rows["image_id"].isin(images)
    return sorted(rows.loc[alike, "uri"].astype(str))


def _checkpoints(root: Path, runs: Iterable[StageRun]) -> list[str]:
    keys = {(run.stage, run.tags.get("ultraflux.stage_key", "")) for run in runs}
    folders = {state_folder(root, stage, key) for stage, key in keys if key and stage in TRAINING}
    return sorted(str(folder.relative_to(root)) for folder in folders if folder.is_dir())


def _cost(evidence: Evidence) -> dict[str, float]:
    """Hours by stage of `select` and all below it: selection decides what they read."""
    clone = Clone(evidence.root)
    with clone.opened():
        graph = clone.graph()
    below = {"select"}
    for name, node in graph.items():
        if below & set(node.upstream):
            below.add(name)
    return {
        name: duration(node, evidence.runs, clone.parameters(name))[0]
        for name, node in graph.items()
        if name in below
    }
