"""From the gate's decision (`data/promote/decision.json`) to the registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.files.whole_files import write_bytes
from flows.tracking.registry import Promotion, register
from flows.tracking.uploader import Uploader, tracking_config

DECISION = Path("data/promote/decision.json")
SCORES = Path("data/evaluate/scores.parquet")
BASELINES = Path("baselines")


class PromotionRefused(RuntimeError):
    """There is no decision, or the gate said no; one line."""


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
    try:
        decision: dict[str, Any] = json.loads((root / DECISION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromotionRefused(
            f"{DECISION} is missing: run the pipeline first (`ultraflux run`)"
        ) from None
    if not decision["promoted"]:
        raise PromotionRefused(explain(decision))
    return decision


def keep_baseline(root: Path) -> str:
    """Keep the promoted models' scores as a baseline; returns the settings that make it one.

    Raises:
        PromotionRefused: no decision yet, or the gate refused: only a champion is a baseline.
    """
    _promoted(root)
    data = (root / SCORES).read_bytes()
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
    """
    decision = _promoted(root)
    uploader = Uploader(root)
    lines = []
    for promotion in promotions(root, decision, uploader.project):
        chosen = replace(promotion, alias=alias or promotion.alias)
        version = register(uploader.client, uploader.experiment_id, None, chosen, root=root)
        lines.append(f"{chosen.model} version {version.version} -> {chosen.alias}")
    return "\n".join(lines)
