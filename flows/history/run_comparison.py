"""What differs between two runs, commits or the workspace: code, data, settings, metrics, packages.

A side is read from a pipeline's record, a stage's run, a git revision, or the clone as it stands;
metrics of a side are those of the runs that made its data (same DVC hashes), under `stage.metric`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.metrics.cards import CARDS
from components.settings.yaml_files import parse_yaml
from flows.history.run_evidence import Evidence, StageRun
from flows.history.run_history import find_pipeline
from flows.records.programs import git_answer
from flows.records.provenance import locked_packages, provenance_tags
from flows.records.records import Record
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import dep_hashes, out_hashes
from flows.versioning.parameters import flatten
from flows.versioning.setting_overrides import read_params

WORKSPACE = "workspace"
_COMMIT, _DIRTY, _DIFF = "mlflow.source.git.commit", "git.dirty", "git.diff_sha256"
_ENVIRONMENT = ("lock.sha256", "python", "platform", "host")
_MANIFESTS = tuple(f"data/{s}/manifest.parquet" for s in ("slices", "caption", "select"))


class SideUnknown(ValueError):
    """Neither a run nor a revision; one line."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    title: str
    commit: str = ""
    dirty: bool = False
    diff_sha256: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    """DVC hash by path."""
    metrics: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricChange:
    """One number on both sides; None where a side has none."""

    name: str
    before: float | None
    after: float | None
    direction: str
    """higher, lower or neither is better, by the metric's card; empty without a card."""

    @property
    def difference(self) -> float | None:
        """After minus before."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """Better or worse, where the card has a direction."""
        if not self.difference or self.direction not in {"higher", "lower"}:
            return ""
        return "better" if (self.difference > 0) == (self.direction == "higher") else "worse"


def direction(name: str) -> str:
    """Direction of `stage.system_metric` by the card whose id ends the name; photographs have none.

    "evaluate.reconstruction_after_psnr_db" ends in "psnr_db".
    """
    metric = name.partition(".")[2] or name
    if metric.startswith("photographs_"):
        return ""
    ends = [c for c in CARDS if metric == c.id or metric.endswith(f"_{c.id}")]
    # The longest: "psnr_db" and "db" both end the name, and the shorter may mean another direction.
    return max(ends, key=lambda card: len(card.id)).direction if ends else ""


def find_side(evidence: Evidence, name: str) -> Side:
    """A side by `workspace`, record id, MLflow run id, `pipeline`, stage name or git revision.

    `pipeline` and the name of a stage stand for the newest run.

    Raises:
        SideUnknown: see there.
    """
    if name == WORKSPACE:
        return _workspace(evidence)
    if (record := find_pipeline(evidence.root, name)) is not None:
        return _pipeline(evidence, record)
    runs = [r for r in evidence.runs if name in {r.stage, r.record_id, r.run_id} - {""}]
    if runs:
        return _stage(runs[-1])
    return _revision(evidence, name)


def _tagged(title: str, tags: Mapping[str, str], **values: Any) -> Side:
    settings = values.get("settings", {})
    environment = {name: tags[name] for name in _ENVIRONMENT if name in tags}
    if "runtime.device" in settings:
        environment["device"] = str(settings["runtime.device"])
    return Side(
        title=title,
        commit=tags.get(_COMMIT, ""),
        dirty=tags.get(_DIRTY) == "true",
        diff_sha256=tags.get(_DIFF, ""),
        environment=environment,
        **values,
    )


def _workspace(evidence: Evidence) -> Side:
    root = evidence.root
    settings = dict(flatten(read_params(root)))
    data, metrics = _locked(evidence, evidence.lock)
    return _tagged(WORKSPACE, provenance_tags(root), settings=settings, data=data, metrics=metrics)


def _pipeline(evidence: Evidence, record: Record) -> Side:
    result = record.result
    tags = result.tags if result is not None else {}
    made = {value for tag, value in tags.items() if tag.endswith(".run_id")}
    runs = [r for r in evidence.runs if made & {r.run_id, r.record_id} - {""}]
    data: dict[str, str] = {}
    for made_by in runs:
        data |= _data(made_by)
    metrics = _headlines(runs)
    lock = record.folder / "dvc.lock"
    if lock.is_file():
        stages = versioning.locked_stages(lock.read_text(encoding="utf-8"))
        data, metrics = _locked(evidence, stages)
    title, settings = record.record_id, record.run.params
    return _tagged(title, record.run.tags, settings=settings, data=data, metrics=metrics)


def _stage(run: StageRun) -> Side:
    params = {
        # MLflow gives texts back.
        name: yaml.safe_load(value) if run.source == "mlflow" else value
        for name, value in run.params.items()
    }
    metrics = _headlines([run])
    return _tagged(run.name, run.tags, settings=params, data=_data(run), metrics=metrics)


def _data(run: StageRun) -> dict[str, str]:
    """What a run read and made, without code."""
    return {p: h for p, h in run.inputs.items() if p.startswith("data/")} | run.outputs


def _revision(evidence: Evidence, name: str) -> Side:
    root = evidence.root
    commit = git_answer(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        away = f" (MLflow: {evidence.mlflow_problem})" if evidence.mlflow_problem else ""
        raise SideUnknown(
            f"{name}: neither `{WORKSPACE}`, a run, a stage with a run, nor a git revision{away}"
        )
    params = git_answer(root, "show", f"{commit}:params.yaml")
    settings = dict(flatten(parse_yaml(params, f"{commit}:params.yaml"))) if params else {}
    lock = git_answer(root, "show", f"{commit}:dvc.lock")
    data, metrics = _locked(evidence, versioning.locked_stages(lock or ""))
    return _tagged(name, {_COMMIT: commit}, settings=settings, data=data, metrics=metrics)


def _headlines(runs: list[StageRun]) -> dict[str, float]:
    return {f"{run.stage}.{key}": v for run in runs for key, v in run.metrics.items()}


def _locked(
    evidence: Evidence, stages: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, float]]:
    """Data of a lock, and the metrics of the runs that made them (or of their metric files)."""
    data: dict[str, str] = {}
    metrics: dict[str, float] = {}
    for stage, entry in stages.items():
        outputs = out_hashes(entry)
        # What came from outside any stage: the photographs, the contracts.
        inputs = dep_hashes(entry)
        data |= {p: h for p, h in inputs.items() if p.startswith("data/")} | outputs
        made = [r for r in evidence.runs if r.stage == stage and r.outputs == outputs and r.metrics]
        if made:
            metrics |= _headlines(made[-1:])
            continue
        for path in outputs:
            if Path(path).name in {"metrics.json", "summary.json"}:
                metrics |= _of_file(stage, evidence.file(path, outputs[path]))
    return data, metrics


def _of_file(stage: str, file: Path | None) -> dict[str, float]:
    if file is None:
        return {}
    values = flatten(json.loads(file.read_text(encoding="utf-8")))
    return {f"{stage}.{k}": float(v) for k, v in values if isinstance(v, int | float)}


def compare(evidence: Evidence, before: Side, after: Side) -> dict[str, Any]:
    """Everything that differs, as plain values: code, data, corpus, settings, metrics, environment.

    Settings and hashes that only one side has stand there with None on the other; of two runs of
    one stage only what that stage declares is known. `without_data` names sides whose hashes are
    not known, such as revisions without a dvc.lock: equal there means nothing.
    """
    names = list({**before.metrics, **after.metrics})
    changes = [
        MetricChange(n, before.metrics.get(n), after.metrics.get(n), direction(n)) for n in names
    ]
    return {
        "runs": [before.title, after.title],
        "code": _code(evidence.root, before, after),
        "data": _changed(before.data, after.data),
        "without_data": [side.title for side in (before, after) if not side.data],
        "corpus": _corpus(evidence, before, after),
        "settings": _changed(before.settings, after.settings),
        "metrics": {
            c.name: {
                "before": c.before,
                "after": c.after,
                "difference": c.difference,
                "better": c.direction,
                "verdict": c.verdict,
            }
            for c in changes
            if not _equal(c.before, c.after)
        },
        "environment": _changed(before.environment, after.environment),
        "packages": _packages(evidence.root, before, after),
    }


def _equal(before: object, after: object) -> bool:
    """NaN on both sides is no difference."""
    return before == after or (before != before and after != after)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [before.get(name), after.get(name)]
        for name in sorted({*before, *after})
        if not _equal(before.get(name), after.get(name)) or (name in before) != (name in after)
    }


def _code(root: Path, before: Side, after: Side) -> dict[str, Any]:
    sides = {
        name: [getattr(before, name), getattr(after, name)]
        for name in ("commit", "dirty", "diff_sha256")
    }
    stat: str | None = ""
    if before.commit and after.commit and before.commit != after.commit:
        # What is versioned by DVC or listed under settings would only repeat itself here.
        paths = ("--", ":!dvc.lock", ":!params.yaml")
        stat = git_answer(root, "diff", "--stat=100", before.commit, after.commit, *paths)
    if stat is None:
        stat = "a commit is not in this clone: `git fetch`"
    same = before.commit == after.commit and before.diff_sha256 == after.diff_sha256
    return {**sides, "equal": same, "stat": stat.splitlines()}


def _corpus(evidence: Evidence, before: Side, after: Side) -> dict[str, Any] | None:
    """Row by row, of the furthest manifest that both sides have; None where they are equal."""
    from components.corpus.manifest_columns import ManifestOnDisk
    from components.corpus.pages.corpus_diff import VALUES_OF, diff

    for path in _MANIFESTS:
        hashes = before.data.get(path), after.data.get(path)
        if hashes[0] is None or hashes[1] is None:
            continue
        if hashes[0] == hashes[1]:
            return None
        files = [evidence.file(path, md5) for md5 in hashes if md5]
        if None in files:
            return {"manifest": path, "problem": "a version is not in the cache: `dvc fetch`"}
        try:
            tables = [ManifestOnDisk(file, VALUES_OF) for file in files if file is not None]
            return {"manifest": path, **diff(*tables).to_json()}
        except ValueError as problem:
            return {"manifest": path, "problem": str(problem)}
    return None


def _packages(root: Path, before: Side, after: Side) -> dict[str, list[Any]]:
    """Versions in requirements.lock at the two commits, where they differ."""
    if before.commit == after.commit:
        return {}
    locks = [
        locked_packages(git_answer(root, "show", f"{side.commit}:requirements.lock") or "")
        for side in (before, after)
    ]
    # An empty side is a commit that is not here: every package would seem new.
    return _changed(*locks) if all(locks) else {}
