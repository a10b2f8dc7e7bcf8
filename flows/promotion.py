"""From the gate's decision (`data/promote/decision.json`) to the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.registry import Promotion, register
from flows.tracking import Uploader, tracking_config

DECISION = Path("data/promote/decision.json")


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
            tags={f"gate.{rule}": text for rule, text in gate.items()},
        )
        for kind, digest in sorted(decision["digests"].items())
    ]


def explain(decision: Mapping[str, Any]) -> str:
    """One line: promoted, or which rule refused and by how much."""
    if decision["promoted"]:
        return f"promoted to alias '{decision['alias']}'"
    failed = [
        f"{rule['name']} {_number(rule['value'])} is below {_number(rule['threshold'])}"
        for rule in decision["rules"]
        if not rule["passed"]
    ]
    return f"not promoted: {'; '.join(failed)}"


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"


def promote_from_decision(root: Path) -> str:
    """Apply the decision on disk to the registry; returns a line that says what was done.

    Raises:
        PromotionRefused: no decision yet, or the gate refused.
    """
    try:
        decision = json.loads((root / DECISION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromotionRefused(
            f"{DECISION} is missing: run the pipeline first (`ultraflux run`)"
        ) from None
    if not decision["promoted"]:
        raise PromotionRefused(explain(decision))
    uploader = Uploader(root)
    lines = []
    for promotion in promotions(root, decision, uploader.project):
        version = register(uploader.client, uploader.experiment_id, None, promotion)
        lines.append(f"{promotion.model} version {version.version} -> {promotion.alias}")
    return "\n".join(lines)
