"""From the gate's decision (`data/promote/decision.json`) to the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from components.files.whole_files import write_bytes
from flows.records.records import TornJson, from_json, read_whole_json
from flows.tracking.registry import Promotion, register
from flows.tracking.store_problems import TrackingAway, refuse_damaged
from flows.tracking.uploader import Uploader, tracking_config, tracking_uri

DECISION = Path("data/promote/decision.json")
SCORES = Path("data/evaluate/scores.parquet")
BASELINES = Path("baselines")


class PromotionRefused(RuntimeError):
    """There is no decision, or the gate said no; one line."""


@dataclass(frozen=True)
class _Rule:
    name: str
    passed: bool
    value: float | None
    threshold: float | None
    reason: str | None = None


@dataclass(frozen=True)
class _Decision:
    """What is read of the file."""

    promoted: bool
    alias: str
    rules: list[_Rule]
    not_compared: list[str]
    baseline: str | None
    digests: dict[str, str]
    paths: dict[str, str]
    scores_sha256: str = ""


def promotions(root: Path, decision: Mapping[str, Any], project: str) -> list[Promotion]:
    """What a decision means for the registry; no alias when the gate refused."""
    names = tracking_config(root)["registry"]
    gate = {
        rule["name"]: f"{rule['value']} (needs {rule['threshold']})" for rule in decision["rules"]
    }
    return [
        Promotion(
            model=names[kind].format(project=project),
            path=decision["paths"][kind],
            digest=digest,
            alias=decision["alias"] if decision["promoted"] else None,
            tags={f"gate.{rule}": text for rule, text in gate.items()}
            | {"gate.baseline": decision["baseline"] or "none yet"},
        )
        for kind, digest in sorted(decision["digests"].items())
    ]


def explain(decision: Mapping[str, Any]) -> str:
    """One line: promoted, or which rule refused and by how much."""
    if decision["promoted"]:
        waiting = decision["not_compared"]
        missing = f"; no baseline yet: {', '.join(waiting)} not compared" if waiting else ""
        return f"promoted to alias '{decision['alias']}'{missing}"
    failed = [
        f"{rule['name']}: {rule['reason']}"
        if rule.get("reason")
        else f"{rule['name']} {_number(rule['value'])} is below {_number(rule['threshold'])}"
        for rule in decision["rules"]
        if not rule["passed"]
    ]
    return f"not promoted: {'; '.join(failed)}"


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"


def _promoted(root: Path) -> dict[str, Any]:
    """The decision on disk, where it is a yes."""
    path = root / DECISION
    try:
        values = read_whole_json(path)
        if values is None:
            raise PromotionRefused(
                f"{DECISION} is missing: run the pipeline first (`ultraflux run`)"
            )
        decision = asdict(from_json(_Decision, values, path))
    except TornJson as problem:
        raise PromotionRefused(f"{problem}: `ultraflux run` decides again") from None
    if not decision["promoted"]:
        raise PromotionRefused(explain(decision))
    return decision


def judged_scores(root: Path) -> bytes:
    """The scores that the promoted models were judged by.

    Raises:
        PromotionRefused: no decision yet, the gate refused (only a champion is a baseline), or
            the scores are missing or others.
    """
    judged = _promoted(root)["scores_sha256"]
    again = "`ultraflux run` measures and decides again"
    if not judged:
        raise PromotionRefused(f"{DECISION} is of older code, which names no scores: {again}")
    try:
        data = (root / SCORES).read_bytes()
    except FileNotFoundError:
        raise PromotionRefused(f"{SCORES} is missing: {again}") from None
    if hashlib.sha256(data).hexdigest() != judged:
        raise PromotionRefused(f"{SCORES} is not what {DECISION} was decided on: {again}")
    return data


def keep_baseline(root: Path) -> str:
    """Keep the promoted models' scores as a baseline; returns the settings that make it one.

    Raises:
        PromotionRefused: see `judged_scores`.
    """
    data = judged_scores(root)
    digest = hashlib.sha256(data).hexdigest()
    # Named by content: a baseline is never replaced in place, so old settings keep their meaning.
    kept = BASELINES / f"{digest[:16]}.parquet"
    (root / BASELINES).mkdir(exist_ok=True)
    write_bytes(root / kept, data)
    return (
        f"{kept} written; commit it and set in the profile:\n"
        f"promote:\n  baseline:\n    scores: {kept}\n    sha256: {digest}"
    )


def promote_from_decision(root: Path, alias: str | None = None) -> str:
    """Apply the decision on disk to the registry; returns a line that says what was done.

    Args:
        root: the clone.
        alias: to give instead of the decision's.

    Raises:
        PromotionRefused: no decision yet, or the gate refused.
        TrackingAway: MLflow cannot be reached, or another program holds its database.
        DamagedStore: it cannot read its own.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    decision = _promoted(root)
    lines = []
    try:
        uploader = Uploader(root)
        for promotion in promotions(root, decision, uploader.project):
            chosen = replace(promotion, alias=alias or promotion.alias)
            version = register(uploader.client, uploader.experiment_id, None, chosen, root=root)
            lines.append(f"{chosen.model} version {version.version} -> {chosen.alias}")
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError) as problem:
        store = tracking_uri(root)
        refuse_damaged(store, problem)
        raise TrackingAway.of(store, problem, "models", "promote") from None
    return "\n".join(lines)
