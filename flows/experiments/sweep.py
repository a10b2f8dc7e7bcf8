"""Sweeps: sets of settings as pipeline runs, each in a working tree of its own over one DVC cache.

Trees are made like those of ablations. Stages that sets share are computed once (see
`flows.running.shared_turns`); a tree that exists already is used again, so the same command resumes
a sweep.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.evaluation.suites.ablation import Arm, with_overrides
from flows.experiments.sweep_sets import short_digest
from flows.history.run_comparison import direction
from flows.history.run_evidence import StageRun, finished_runs
from flows.records.owners import own_record
from flows.records.provenance import provenance_tags
from flows.records.records import Record, RunDescription, RunResult, open_record, write_json
from flows.records.trees import SWEEP, tree_place
from flows.running.guarded_process import GuardedProcess
from flows.running.shared_turns import SHARED_TURNS
from flows.running.working_trees import settings_tree, tree_environment
from flows.tracking.sync import sync_once
from flows.versioning.graph import read_lock
from flows.versioning.lock_hashes import out_hashes
from flows.versioning.setting_overrides import read_params

Order = Literal["lowest", "highest"]


@dataclass(frozen=True)
class SetResult:
    """One set of a sweep."""

    name: str
    settings: dict[str, Any]
    tree: str
    problem: str = ""
    """Why it did not finish; empty where it did."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Headline metrics under `stage.metric`."""


def run_sweep(
    root: Path, name: str, sets: Sequence[Arm], *, parallel: int, until: str | None
) -> tuple[Record, list[SetResult]]:
    """Bring every set up to date.

    Args:
        root: the clone.
        name: folder below `runs/sweep`.
        sets: in order.
        parallel: how many run at once; they divide the machine's cores.
        until: last stage; None: all.

    Returns:
        The sweep's record, not yet finished, and a result per set.

    Raises:
        TreeRefused: a tree cannot be made.
    """
    folder = tree_place(root, SWEEP, name)
    params = read_params(root)
    # One after the other: Git locks the list of its worktrees.
    trees = [
        settings_tree(root, folder / one.name, with_overrides(params, one.overrides))
        for one in sets
    ]
    record = _open(root, name, sets)
    # Known after the upload that `_open` made; the sets' runs hang below it.
    parent = record.mlflow_run_id
    cores = max(1, (os.cpu_count() or 1) // parallel)
    command = ["ultraflux", "run", "--cpus", str(cores), *(["--until", until] if until else [])]

    def run(one: Arm, tree: Path) -> SetResult:
        tags = {"ultraflux.sweep": name, "ultraflux.sweep_set": one.label}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        env = tree_environment(tree, record_in=root, tags=tags)
        # Sets that are equal up to a stage would all compute it at once, and all but one in vain.
        env[SHARED_TURNS] = str(folder / "turns")
        log = tree / "runs" / "sweep.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            process = GuardedProcess(command, cwd=tree, env=env, output=output)
            running.append(process)
            code = process.wait()
        said = log.read_text(errors="replace").strip().splitlines()
        problem = "" if code == 0 else (said[-1] if said else f"exit code {code}")
        print(f"{one.name}  {one.label}: {problem or 'finished'}  (log: {log})", flush=True)
        return SetResult(one.name, dict(one.overrides), str(tree.relative_to(root)), problem)

    running: list[GuardedProcess] = []
    pool = ThreadPoolExecutor(max_workers=parallel)
    try:
        made = list(pool.map(run, sets, trees))
    except BaseException:
        # Ctrl-C: sets that did not start are left, those that run save what they have.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return record, _measured(root, made)


def _open(root: Path, name: str, sets: Sequence[Arm]) -> Record:
    """The sweep's record; the parent run in MLflow, where a store answers."""
    run = RunDescription(
        kind="sweep",
        name=f"sweep-{name}",
        stage_key=short_digest([name, *(one.name for one in sets)]),
        params={key: [one.overrides[key] for one in sets] for key in sets[0].overrides},
        tags=provenance_tags(root),
    )
    record = open_record(root, run)
    own_record(root, record.record_id)
    try:
        sync_once(root)
    except Exception as problem:
        text = " ".join(str(problem).split())[:200]
        print(f"MLflow does not answer ({text}): the sets' runs will have no common parent")
    return record


def _measured(root: Path, made: Sequence[SetResult]) -> list[SetResult]:
    """Add the headline metrics of the runs that made each set's outputs, in whichever tree."""
    # A stage that DVC restored was run, and recorded, in another set's tree or in the clone.
    folders = [root, *(root / one.tree for one in made)]
    runs = [run for folder in folders for run in finished_runs(folder, read_lock(folder), None)]
    return [
        one
        if one.problem
        else SetResult(
            **asdict(one) | {"metrics": headline_metrics(runs, read_lock(root / one.tree))}
        )
        for one in made
    ]


def headline_metrics(runs: Sequence[StageRun], stages: Mapping[str, Any]) -> dict[str, float]:
    """`stage.metric` of the newest run that made each stage's outputs in a lock."""
    found: dict[str, float] = {}
    for stage, entry in stages.items():
        outputs = out_hashes(entry)
        made = [run for run in runs if run.stage == stage and run.outputs == outputs]
        if made:
            found |= {f"{stage}.{key}": value for key, value in made[-1].metrics.items()}
    return found


def better(metric: str) -> Order | None:
    """Which end of a metric is good: by its card, or by its name for losses; None: not known."""
    told = direction(metric)
    if told in {"higher", "lower"}:
        return "highest" if told == "higher" else "lowest"
    if "loss" in metric:
        # A relative fall of the loss is a gain.
        return "highest" if metric.endswith("_drop") else "lowest"
    return "highest" if metric.endswith("_gain_db") else None


def differing_metrics(results: Sequence[SetResult]) -> list[str]:
    """Names whose values are not the same in all sets, those with a good end first."""
    names = list(dict.fromkeys(name for one in results for name in one.metrics))
    varied = [n for n in names if len({one.metrics.get(n) for one in results if one.metrics}) > 1]
    # Later stages first: they are what a sweep is for.
    varied.reverse()
    return sorted(varied, key=lambda name: better(name) is None)


def ranked(results: Sequence[SetResult], metric: str | None, order: Order) -> list[SetResult]:
    """Best first; sets without the metric (or with NaN) last, in their order."""

    def place(one: SetResult) -> float:
        value = math.nan if metric is None else one.metrics.get(metric, math.nan)
        if math.isnan(value):
            return math.inf
        return value if order == "lowest" else -value

    return sorted(results, key=place)


def finish(
    root: Path, name: str, record: Record, results: Sequence[SetResult], metric: str | None
) -> Path:
    """Write `results.json` of a sweep and end its record; returns the file."""
    file = tree_place(root, SWEEP, name) / "results.json"
    write_json(file, {"metric": metric, "sets": [asdict(one) for one in results]})
    best = results[0]
    failed = [one for one in results if one.problem]
    numbers = {"sets": float(len(results)), "failed": float(len(failed))}
    tags = {}
    if metric is not None and metric in best.metrics:
        numbers[f"best.{metric}"] = best.metrics[metric]
        tags = {"best.settings": json.dumps(best.settings), "best.metric": metric}
    record.finish(
        RunResult(
            status="FAILED" if failed else "FINISHED",
            metrics=numbers,
            tags=tags,
            artifacts=[str(file.relative_to(root))],
            summary=f"{len(results)} sets, {len(failed)} not finished",
        )
    )
    try:
        sync_once(root)
    except Exception:
        print("MLflow does not answer: send it later with `ultraflux sync`")
    return file
