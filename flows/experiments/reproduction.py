"""A pipeline run once more: its commit, changes, settings and lock in a working tree of their own.

The tree shares the clone's DVC cache, so stages whose results are there are restored; stages that
are computed again are `forced`. Outputs are compared by the hashes in the two dvc.lock files.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.files.weight_folders import file_digest
from flows.history.run_evidence import Evidence
from flows.history.run_history import REPRODUCES_TAG, NoPipeline, find_pipeline
from flows.pipeline.pipeline_run import CHANGES_FILE
from flows.records.provenance import changes_digest
from flows.records.records import all_records, read_json, write_json
from flows.running.working_trees import TreeRefused, add_tree, git, share, tree_environment
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import dep_hashes, out_hashes
from flows.versioning.setting_overrides import read_params

_COMMIT, _DIFF, _PACKAGES = "mlflow.source.git.commit", "git.diff_sha256", "lock.sha256"
_MARKER = Path("runs") / "reproduction.json"


class ReproductionRefused(RuntimeError):
    """The run cannot be set up here; one line."""


@dataclass(frozen=True)
class Recorded:
    """What a run left behind to be run again from."""

    name: str
    """Record id, MLflow run id or Git revision."""
    commit: str
    params: bytes | None
    """params.yaml; None: the commit's."""
    lock: bytes
    """dvc.lock."""
    changes: bytes = b""
    """Patch of uncommitted changes."""
    tags: Mapping[str, str] = field(default_factory=dict)

    def ended(self, stage: str) -> bool:
        """Whether the run brought this stage to its end; of a revision every stage counts."""
        status = self.tags.get(f"stage.{stage}")
        known = any(tag.startswith("stage.") for tag in self.tags)
        return status in {"ran", "skipped"} if known else True


@dataclass(frozen=True)
class StageComparison:
    """One stage of the recorded lock beside the reproduction."""

    stage: str
    verdict: Literal["equal", "differs", "missing"]
    outputs: dict[str, tuple[str, str]]
    """(recorded, reproduced) DVC hash by path where they differ."""
    inputs: tuple[str, ...]
    """Dependencies and settings that differ."""
    how: str
    """computed, restored or unknown."""


def find_recorded(evidence: Evidence, name: str) -> Recorded:
    """A run by record id, MLflow run id, stage run (its pipeline), `pipeline` or Git revision.

    Raises:
        ReproductionRefused: nothing by that name, or it kept no dvc.lock.
    """
    root = evidence.root
    stages = [run for run in evidence.runs if name in {run.record_id, run.run_id} - {""}]
    for one in (name, *(run.parent for run in stages if run.parent)):
        try:
            record = find_pipeline(root, one)
        except NoPipeline as problem:
            raise ReproductionRefused(str(problem)) from None
        if record is not None:
            tags = record.run.tags | (record.result.tags if record.result else {})
            return _from_folder(record.folder, record.record_id, tags)
    return _from_mlflow(evidence, name) or _from_revision(evidence, name)


def _from_folder(folder: Path, name: str, tags: Mapping[str, str]) -> Recorded:
    if not (folder / "dvc.lock").is_file():
        raise ReproductionRefused(
            f"{name}: the run kept no dvc.lock (it has not ended, or is of an older version), so "
            "there is nothing to compare with; reproduce its Git commit instead"
        )
    if _COMMIT not in tags:
        raise ReproductionRefused(f"{name}: the run was made outside Git; its code is not known")
    params, changes = folder / "params.yaml", folder / CHANGES_FILE
    return Recorded(
        name=name,
        commit=tags[_COMMIT],
        params=params.read_bytes() if params.is_file() else None,
        lock=(folder / "dvc.lock").read_bytes(),
        changes=changes.read_bytes() if changes.is_file() else b"",
        tags=tags,
    )


def _from_mlflow(evidence: Evidence, name: str) -> Recorded | None:
    """A run of another clone: its files come from the artifact store."""
    from mlflow.exceptions import MlflowException

    client = evidence.client
    if client is None:
        return None
    try:
        run = client.get_run(name)
        if run.data.tags.get("ultraflux.kind") == "stage":
            run = client.get_run(run.data.tags["mlflow.parentRunId"])
    except (MlflowException, KeyError):
        return None
    kept = {"params.yaml", "dvc.lock", CHANGES_FILE}
    with tempfile.TemporaryDirectory() as folder:
        for item in client.list_artifacts(run.info.run_id):
            if item.path in kept:
                client.download_artifacts(run.info.run_id, item.path, folder)
        return _from_folder(Path(folder), run.info.run_id, run.data.tags)


def _from_revision(evidence: Evidence, name: str) -> Recorded:
    root = evidence.root
    away = f"; MLflow: {evidence.mlflow_problem}" if evidence.mlflow_problem else ""
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except TreeRefused:
        raise ReproductionRefused(
            f"{name}: neither a pipeline run, a stage's run, nor a Git revision{away}"
        ) from None
    try:
        # `git` strips the last line end, and the file's hash is compared.
        lock = os.fsencode(git(root, "show", f"{commit}:./dvc.lock")) + b"\n"
    except TreeRefused:
        raise ReproductionRefused(
            f"{name}: there is no dvc.lock in this revision, so there is nothing to compare with; "
            "name a pipeline run instead"
        ) from None
    return Recorded(name, commit, None, lock)


def set_up(root: Path, recorded: Recorded, tree: Path) -> list[str]:
    """Make the working tree of a run, or go on with the one that is there.

    Args:
        root: the clone.
        recorded: the run.
        tree: folder for it, new or of an earlier reproduction of the same run.

    Returns:
        Warnings: what could not be set up as it was.

    Raises:
        ReproductionRefused: the folder holds something else, the commit is not in this clone, or
            the changes do not apply.
    """
    warnings: list[str] = []
    marker = read_json(tree / _MARKER)
    if marker is not None and marker["run"] != recorded.name:
        raise ReproductionRefused(f"{tree} is of {marker['run']}; choose another folder (--into)")
    try:
        if marker is None:
            _new_tree(root, recorded, tree)
        values = read_params(tree)
        share(root, tree, values.get("ingest", {}).get("source"))
    except TreeRefused as problem:
        raise ReproductionRefused(f"{recorded.name}: {problem}") from None
    write_json(tree / _MARKER, {"run": recorded.name, "commit": recorded.commit})
    if recorded.tags and changes_digest(tree) != recorded.tags.get(_DIFF, ""):
        warnings.append(
            "the run had uncommitted files that were not kept (large, or neither code nor settings)"
        )
    packages = _digest(tree / "requirements.lock")
    if packages != _digest(root / "requirements.lock"):
        warnings.append(
            "the run's requirements.lock is not this clone's: for its packages, install "
            f"{tree / 'requirements.lock'} into an environment of its own and run the command there"
        )
    if recorded.tags.get(_PACKAGES, packages) != packages:
        warnings.append("requirements.lock of the tree is not the one that the run recorded")
    return warnings


def _digest(path: Path) -> str:
    return file_digest(path) if path.is_file() else ""


def _new_tree(root: Path, recorded: Recorded, tree: Path) -> None:
    try:
        git(root, "cat-file", "-e", f"{recorded.commit}^{{commit}}")
    except TreeRefused:
        raise ReproductionRefused(
            f"{recorded.name}: commit {recorded.commit[:12]} is not in this clone: `git fetch` it"
        ) from None
    if tree.is_dir() and any(tree.iterdir()):
        raise ReproductionRefused(f"{tree}: there are files already; choose another folder")
    add_tree(root, tree, recorded.commit)
    if recorded.changes:
        git(tree, "apply", "--binary", "--whitespace=nowarn", "-", data=recorded.changes)
    if recorded.params is not None:
        (tree / "params.yaml").write_bytes(recorded.params)
    # DVC then compares against that run: stages whose inputs are equal are restored, not computed.
    (tree / "dvc.lock").write_bytes(recorded.lock)


def run_again(
    root: Path, recorded: Recorded, tree: Path, *, recompute: bool, stages: Sequence[str]
) -> bool:
    """Bring the tree up to date; DVC restores what its cache has.

    Args:
        root: the clone, in whose MLflow store the new run is recorded too.
        recorded: the run.
        tree: made by `set_up`.
        recompute: run stages even where the cache has their results.
        stages: which of them; all where it is empty.

    Returns:
        Whether everything ended well.
    """
    env = tree_environment(tree, record_in=root, tags={REPRODUCES_TAG: recorded.name})

    def ends_well(*command: str) -> bool:
        # Standard output is for the comparison.
        return subprocess.run(command, cwd=tree, env=env, stdout=2).returncode == 0

    # What the lock names and the cache has; the rest is for the stages to make.
    ends_well("dvc", "checkout", "-q", "--allow-missing")
    last = last_stage(recorded, tree)
    until = () if last is None else ("--until", last)
    if recompute and not stages:
        return ends_well("ultraflux", "run", "--force", *until)
    if not ends_well("ultraflux", "run", *until):
        return False
    # In the order of the graph: a later stage is to read what an earlier one has computed anew.
    order = [name for name in versioning.stage_graph(tree) if name in stages]
    return all(ends_well("dvc", "--wait-for-lock", "repro", "-s", "-f", name) for name in order)


def last_stage(recorded: Recorded, tree: Path) -> str | None:
    """Where the run was asked to stop (`--until`); None: it had the whole graph, or is a revision.

    A run says of each of its stages how it ended, of one that it could not begin, too.
    """
    had = {name for name in versioning.stage_graph(tree) if f"stage.{name}" in recorded.tags}
    ends = [name for name in had if set(versioning.stages_until(tree, name)) == had]
    return ends[0] if ends and had < set(versioning.stage_graph(tree)) else None


def compare_locks(recorded: Recorded, tree: Path) -> list[StageComparison]:
    """Outputs of every stage that the run ended, in the order of the graph."""
    old = versioning.locked_stages(recorded.lock.decode())
    new = versioning.locked_stages((tree / "dvc.lock").read_text(encoding="utf-8"))
    # Restored stages leave no record.
    computed = {r.run.name for r in all_records(tree) if r.run.kind == "stage" and r.result}
    compared = []
    for stage in versioning.stage_graph(tree):
        if stage not in old or not recorded.ended(stage):
            continue
        before, after = old[stage], new.get(stage, {})
        outputs = dict(_different(out_hashes(before), out_hashes(after)))
        inputs = [*_different(_deps(before), _deps(after))]
        verdict: Literal["equal", "differs", "missing"] = "differs" if outputs else "equal"
        compared.append(
            StageComparison(
                stage=stage,
                verdict=verdict if after else "missing",
                outputs=outputs,
                inputs=tuple(path for path, _ in inputs),
                how="computed" if stage in computed else "restored",
            )
        )
    return compared


def _deps(entry: Mapping[str, Any]) -> dict[str, str]:
    from flows.versioning.parameters import flatten

    params = {name: str(value) for name, value in flatten(entry.get("params", {}))}
    return dep_hashes(entry) | params


def _different(
    before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[tuple[str, tuple[str, str]]]:
    for path in sorted({*before, *after}):
        sides = before.get(path, ""), after.get(path, "")
        if sides[0] != sides[1]:
            yield path, sides
