"""Runs the arms of an ablation, each in a working tree of its own over one DVC cache.

A tree is a detached Git worktree below `runs/ablate/`, so arms have the committed code; its
`params.yaml` is that of the arm. Stages that arms share come from DVC's run cache. A tree that
exists is gone on with, so an interrupted ablation is resumed by the same command.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from components.evaluation.ablation import Arm, Design, planned_stages, with_overrides
from components.evaluation.comparison import Comparison, compare_systems
from components.evaluation.published import (
    ABLATION_DATA_MODEL,
    ABLATION_LADDER,
    PublishedTable,
)
from components.evaluation.scores import GENERATED, values_of
from flows.setting_overrides import read_params
from flows.versioning import stage_graph
from flows.working_trees import TreeRefused, settings_tree, tree_environment

PUBLISHED: dict[Design, PublishedTable] = {
    "ladder": ABLATION_LADDER,
    "data-model": ABLATION_DATA_MODEL,
}


class AblationFailed(RuntimeError):
    """An arm cannot be run; one line."""


def plan(root: Path, arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """Which arm runs which stage; see `components.evaluation.ablation.planned_stages`."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    upstream = {name: node.upstream for name, node in stage_graph(root).items()}
    return planned_stages(arms, read_params(root), stages, upstream)


def arm_tree(root: Path, design: Design, arm: Arm) -> Path:
    """The arm's working tree at the present commit, made or brought up to date.

    Raises:
        AblationFailed: see `flows.working_trees.settings_tree`.
    """
    values = with_overrides(read_params(root), arm.overrides)
    try:
        return settings_tree(root, root / "runs" / "ablate" / design / arm.name, values)
    except TreeRefused as problem:
        raise AblationFailed(str(problem)) from None


def run_arm(root: Path, design: Design, arm: Arm) -> Path:
    """Bring an arm up to date; returns its scores table.

    Raises:
        AblationFailed: its pipeline did not finish.
    """
    tree = arm_tree(root, design, arm)
    # A process of its own: the pipeline takes over signals and the working folder.
    done = subprocess.run(["ultraflux", "run"], cwd=tree, env=tree_environment(tree))
    scores = tree / "data" / "evaluate" / "scores.parquet"
    if done.returncode or not scores.is_file():
        raise AblationFailed(f"arm {arm.name} did not finish; run the same command to go on")
    return scores


def ablation_table(
    design: Design, arms: Sequence[Arm], scores: Sequence[Path], *, resamples: int, seed: int
) -> str:
    """Markdown: ours in the papers' layout, paired differences to the first arm, published numbers.

    Args:
        design: whose published table stands below.
        arms: in order.
        scores: table of each arm.
        resamples: of intervals and tests.
        seed: of both.
    """
    tables = [pd.read_parquet(path) for path in scores]
    generated = [table[table["system"] == GENERATED] for table in tables]
    metrics = sorted(set.intersection(*(set(table["metric"]) for table in generated)))
    lines = [f"| Ours | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for arm, table in zip(arms, generated, strict=True):
        means = [values_of(table, GENERATED, metric)["value"].mean() for metric in metrics]
        lines.append(f"| {arm.label} | {' | '.join(f'{mean:.4g}' for mean in means)} |")
    lines += ["", f"Paired differences to '{arms[0].label}', prompts as units, Holm per row:", ""]
    for arm, table in zip(arms[1:], generated[1:], strict=True):
        for found in compare_systems(generated[0], table, metrics, resamples=resamples, seed=seed):
            if isinstance(found, Comparison):
                d = found.difference
                lines.append(
                    f"- {arm.label}, {found.metric}: {d.mean:+.4g} [{d.low:+.4g}, {d.high:+.4g}], "
                    f"p = {found.adjusted_p:.3g}, n = {d.n}"
                )
            else:
                lines.append(f"- {arm.label}: not compared: {found.reason}")
    published = PUBLISHED[design]
    lines += ["", f"Published ({published.source}; other data, weights and 4096 x 4096):", ""]
    lines += [
        f"| {published.caption} | {' | '.join(published.columns)} |",
        "|---|" + "---|" * len(published.columns),
        *(f"| {label} | {' | '.join(values)} |" for label, values in published.rows),
    ]
    return "\n".join(lines) + "\n"
