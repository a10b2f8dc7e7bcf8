"""What `ultraflux lineage` was asked about: a picture, a photograph, weights, a version, a run."""

from __future__ import annotations

import re
from pathlib import Path

from components.files.weight_folders import file_digest, folder_digest
from components.generation.image_metadata import read_metadata
from flows.history.lineage import Lineage, Node
from flows.history.run_evidence import StageRun
from flows.history.run_history import find_pipeline
from flows.tracking.registry import RegisteredWeights

_HEX = re.compile(r"[0-9a-f]{8,64}")
_MODEL = re.compile(r"(?:models:/)?(?P<name>[\w.-]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))?")


class TargetUnknown(ValueError):
    """Nothing here goes by that name; one line."""


def explain(lineage: Lineage, target: str) -> Node:
    """The walk that fits a target: a path, a run, a model version or a sha256.

    Raises:
        TargetUnknown: see there.
    """
    path = Path(target)
    if path.is_dir():
        if next(path.rglob("*.safetensors"), None) is None:
            raise TargetUnknown(
                f"{path}: a folder without weights (*.safetensors); name one picture or photograph"
            )
        return lineage.weights(folder_digest(path))
    if path.is_file():
        return _file(lineage, path)
    for find in (_run, _model, _digest):
        node = find(lineage, target)
        if node is not None:
            return node
    stages = sorted({run.stage for run in lineage.evidence.runs})
    known = f"; stages with runs: {', '.join(stages)}" if stages else "; nothing has run here yet"
    client = lineage.evidence
    away = f"; MLflow: {client.mlflow_problem}" if client.mlflow_problem else ""
    raise TargetUnknown(
        f"{target}: no file, run, registered model or sha256 that is known here{known}{away}"
    )


def _file(lineage: Lineage, path: Path) -> Node:
    if path.suffix == ".safetensors":
        return lineage.weights(file_digest(path))
    try:
        fields = read_metadata(path)
    except ValueError as problem:
        raise TargetUnknown(str(problem)) from None
    digest = file_digest(path)
    if "ultraflux_key" in fields:
        return lineage.picture(path, fields)
    for run, line in lineage.generations():
        if line["image_sha256"] == digest:
            return lineage.known_picture(run, line)
    node = lineage.photograph(digest, _relative(lineage.evidence.root, path))
    if node is None:
        raise TargetUnknown(
            f"{path}: a picture without this project's metadata, and no manifest holds its sha256 "
            f"{digest[:16]}; was the metadata removed, or the photograph never ingested?"
        )
    if not any(child.facts.get("image_id") == digest for child in node.children):
        node.facts["warning"] = "the corpus holds other bytes under this path"
    return node


def _relative(root: Path, path: Path) -> str:
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return path.name


def _run(lineage: Lineage, target: str) -> Node | None:
    """By record id, MLflow run id (or their first 8 digits), or stage name (the newest)."""
    record = find_pipeline(lineage.evidence.root, target, _names)
    if record is not None:
        return lineage.pipeline(record)
    found: list[StageRun] = [
        run
        for run in lineage.evidence.runs
        if target == run.stage or _names(target, run.record_id) or _names(target, run.run_id)
    ]
    if not found:
        return None
    node = lineage.run(found[-1])
    forth = lineage.run_forth(found[-1])
    if forth.children:
        node.children.append(Node("run", "what was made from it", {}, forth.children))
    return node


def _names(target: str, identifier: str) -> bool:
    return bool(identifier) and (
        # Fewer digits would too often name two runs, and a stage's name could be taken for a hash.
        target == identifier or (len(target) >= 8 and identifier.startswith(target))
    )


def _model(lineage: Lineage, target: str) -> Node | None:
    match = _MODEL.fullmatch(target)
    if match is None:
        return None
    known: list[RegisteredWeights] = [v for v in lineage.versions if v.model == match["name"]]
    if match["version"]:
        known = [v for v in known if v.version == match["version"]]
    if match["alias"]:
        known = [v for v in known if match["alias"] in v.aliases]
    if not known:
        return None
    # As numbers: version "10" is newer than "9".
    newest = max(known, key=lambda v: int(v.version or 0))
    return _both_ways(lineage, newest.digest, newest.title)


def _both_ways(lineage: Lineage, digest: str, part: str) -> Node:
    node = lineage.weights(digest, part)
    forth = lineage.weights_forth(digest, part)
    pictures = [child for child in forth.children if child.kind != "version"]
    if pictures:
        node.children.append(Node("picture", "pictures made with it", forth.facts, pictures))
    return node


def _digest(lineage: Lineage, target: str) -> Node | None:
    """By sha256 (or its first digits) of weights, pictures or photographs."""
    if not _HEX.fullmatch(target):
        return None
    weights = {d for run in lineage.evidence.runs for d in run.weights().values()}
    weights |= {version.digest for version in lineage.versions}
    for digest in sorted(weights):
        if digest.startswith(target):
            return _both_ways(lineage, digest, "weights")
    for run, line in lineage.generations():
        if line["image_sha256"].startswith(target) or line["key"].startswith(target):
            return lineage.known_picture(run, line)
    # Manifests are searched for equal hashes; for a beginning each of a million rows would be
    # looked at in every version.
    return lineage.photograph(target) if len(target) == 64 else None
