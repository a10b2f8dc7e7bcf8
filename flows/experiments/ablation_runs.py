"""Runs the arms of an ablation, each in a working tree of its own over one DVC cache.

A tree is a detached Git worktree below `runs/ablate/`, so arms have the committed code; its
`params.yaml` is that of the arm. Stages that arms share come from DVC's run cache. A tree that
exists already is used again, so the same command resumes an interrupted ablation.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from components.evaluation.statistics.scores import GENERATED
from components.evaluation.suites.ablation import Arm, Design, planned_stages, with_overrides
from components.evaluation.suites.ablation_table import ArmScores
from components.evaluation.suites.suites import BENCHMARKS
from flows.records.trees import ABLATE, tree_place
from flows.running.working_trees import settings_tree, tree_environment
from flows.versioning.graph import read_stages, stages_until
from flows.versioning.setting_overrides import read_params


@dataclass(frozen=True)
class SuiteChoice:
    """A benchmark on which every arm's model is measured beside the pipeline's own scores."""

    suite: str
    """As of `ultraflux evaluate`; a folder is meant from where the command was given."""
    metrics: str | None = None
    limit: int | None = None


def plan(root: Path, arms: Sequence[Arm], until: str | None = None) -> dict[str, dict[str, str]]:
    """Which arm runs which stage; see `components.evaluation.suites.ablation.planned_stages`."""
    upstream = {name: node.upstream for name, node in stages_until(root, until).items()}
    return planned_stages(arms, read_params(root), read_stages(root), upstream)


def arm_tree(root: Path, design: Design, arm: Arm) -> Path:
    """The arm's working tree at the present commit, made or brought up to date.

    Raises:
        TreeRefused: see `flows.running.working_trees.settings_tree`.
    """
    values = with_overrides(read_params(root), arm.overrides)
    tree = settings_tree(root, tree_place(root, ABLATE, design, arm.name), values)
    if (root / BENCHMARKS).is_dir() and not (tree / BENCHMARKS).exists():
        (tree / BENCHMARKS).symlink_to((root / BENCHMARKS).resolve())
    return tree


def run_arm(root: Path, design: Design, arm: Arm, choice: SuiteChoice | None = None) -> ArmScores:
    """Bring an arm up to date and read its scores; one that fails says so in them.

    Raises:
        TreeRefused: no arm can be run from this working tree.
    """
    tree = arm_tree(root, design, arm)
    again = "run the same command to go on"
    if _ultraflux(tree, "run"):
        return ArmScores(arm, problem=f"its pipeline did not finish (see above); {again}")
    table = pd.read_parquet(tree / "data" / "evaluate" / "scores.parquet")
    if choice is None:
        return ArmScores(arm, table)
    out = tree / "runs" / "ablation"
    words = ["--system", f"{GENERATED}=trained", "--out", str(out)]
    words += ["--ledger", str(root / "runs" / "ledger")]
    words += [] if choice.metrics is None else ["--metrics", choice.metrics]
    words += [] if choice.limit is None else ["--limit", str(choice.limit)]
    suite = Path(choice.suite)
    # The command runs in the tree, where a relative folder would be another one.
    named = str(suite.absolute()) if suite.is_dir() else choice.suite
    if _ultraflux(tree, "evaluate", named, *words):
        return ArmScores(arm, problem=f"its evaluation did not finish (see above); {again}")
    return _suite_scores(arm, out)


def _suite_scores(arm: Arm, out: Path) -> ArmScores:
    """What `ultraflux evaluate` left, with the numbers of sets."""
    from components.metrics.cards import CARDS

    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    values = {
        card.id: metrics.get(f"{GENERATED}.{card.id}") for card in CARDS if card.needs == "set pair"
    }
    # Null: it was not finite.
    of_sets = {name: float(value) for name, value in values.items() if value is not None}
    return ArmScores(arm, pd.read_parquet(out / "scores.parquet"), of_sets)


def _ultraflux(tree: Path, *words: str) -> int:
    """Exit code of a command in an arm's tree; what it prints is seen."""
    # A process of its own: the pipeline takes over signals and the working folder.
    return subprocess.run(["ultraflux", *words], cwd=tree, env=tree_environment(tree)).returncode
