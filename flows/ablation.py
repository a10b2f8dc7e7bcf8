"""Runs the arms of an ablation, each in a working tree of its own over one DVC cache.

A tree is a detached Git worktree below `runs/ablate/`, so arms have the committed code; its
`params.yaml` is that of the arm. Stages that arms share come from DVC's run cache. A tree that
exists is gone on with, so an interrupted ablation is resumed by the same command.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from flows.versioning import stage_graph

PUBLISHED: dict[Design, PublishedTable] = {
    "ladder": ABLATION_LADDER,
    "data-model": ABLATION_DATA_MODEL,
}


class AblationFailed(RuntimeError):
    """An arm cannot be run; one line."""


def read_params(root: Path) -> dict[str, Any]:
    """`params.yaml` as nested values."""
    values: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    return values


def plan(root: Path, arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """Which arm runs which stage; see `components.evaluation.ablation.planned_stages`."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    upstream = {name: node.upstream for name, node in stage_graph(root).items()}
    return planned_stages(arms, read_params(root), stages, upstream)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise AblationFailed(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def arm_tree(root: Path, design: Design, arm: Arm) -> Path:
    """The arm's working tree at the present commit, made or brought up to date.

    Raises:
        AblationFailed: tracked files other than params.yaml and dvc.lock have uncommitted changes,
            so arms would not run the code at hand; or Git refuses.
    """
    changed = {line[3:] for line in _git(root, "status", "--porcelain", "-uno").splitlines()}
    if foreign := sorted(changed - {"params.yaml", "dvc.lock"}):
        raise AblationFailed(
            f"{foreign[0]} has uncommitted changes, which no arm would see; commit them first"
        )
    tree = root / "runs" / "ablate" / design / arm.name
    commit = _git(root, "rev-parse", "HEAD")
    if tree.is_dir():
        # Its own dvc.lock stays: what ran there needs no second look.
        _git(tree, "checkout", "-q", "--", "params.yaml")
        _git(tree, "checkout", "-q", "--detach", commit)
    else:
        tree.parent.mkdir(parents=True, exist_ok=True)
        _git(root, "worktree", "prune")
        _git(root, "worktree", "add", "-q", "--detach", str(tree), commit)
    cache = root / ".dvc" / "cache"
    (tree / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n", encoding="utf-8")
    values = with_overrides(read_params(root), arm.overrides)
    (tree / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    for name in ("weights", values["ingest"]["source"]):
        # What Git does not carry is shared, not copied.
        if (root / name).exists() and not (tree / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).symlink_to(root / name)
    return tree


def run_arm(root: Path, design: Design, arm: Arm) -> Path:
    """Bring an arm up to date; returns its scores table.

    Raises:
        AblationFailed: its pipeline did not finish.
    """
    tree = arm_tree(root, design, arm)
    # A process of its own: the pipeline takes over signals and the working folder. PYTHONPATH puts
    # the tree's code, which is the commit's, before an editable installation.
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(["ultraflux", "run"], cwd=tree, env=env)
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
