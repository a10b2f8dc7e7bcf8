"""Papers of a clone: facts from its files, origins from its records, written to one folder."""

from __future__ import annotations

import csv
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from components.corpus.selection.attribution import FIELDS
from components.files.weight_folders import file_digest
from components.files.whole_files import whole_file, write_text
from components.papers.bill_of_materials import bill_of_materials
from components.papers.cards import ATTRIBUTION, dataset_card, model_card
from components.papers.croissant import TABLES, croissant
from components.papers.facts import Facts, Origin, PapersIncomplete, read_facts
from components.settings.schema import load_settings
from flows.history.forgetting_certificate import CHAIN
from flows.history.lock_chain import ChainBroken, check_file, check_weights, locked_chain
from flows.history.run_evidence import Evidence, StageRun
from flows.records.provenance import locked_packages
from flows.versioning.lock_hashes import out_hashes

STAGES = ("slices", "vae", "dit_stage1", "dit_stage2", "evaluate")
_BEFORE, _AFTER = ("select", "caption"), ("generate", "evaluate")
"""Stages around `CHAIN` whose numbers papers tell; what has no entry in dvc.lock is not asked."""


def write_papers(root: Path, folder: Path) -> list[Path]:
    """Write `dataset/` and `model/` below a folder; equal results give equal files.

    Args:
        root: the clone; its pipeline has run.
        folder: made if need be.

    Returns:
        what was written.

    Raises:
        PapersIncomplete: a stage has not run, or was not run again after one before it.
        SettingsError: see there.
    """
    evidence = Evidence(root, mlflow=False)
    facts = read_facts(root, load_settings(root / "params.yaml"), _origin(evidence))
    try:
        _check(evidence, facts)
    except ChainBroken as problem:
        raise PapersIncomplete(str(problem)) from None
    dataset, model = folder / "dataset", folder / "model"
    texts = {
        dataset / "README.md": dataset_card(facts),
        dataset / "croissant.json": json.dumps(croissant(facts), indent=1, ensure_ascii=False)
        + "\n",
        model / "README.md": model_card(facts),
        model / "bom.cdx.json": bill_of_materials(facts),
    }
    (dataset / TABLES).mkdir(parents=True, exist_ok=True)
    model.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    written = [*texts]
    for one in facts.slices:
        table = dataset / TABLES / one.path.name
        with whole_file(table) as aside:
            shutil.copyfile(root / one.path, aside)
        written.append(table)
    for place in (dataset, model):
        written.append(_attribution(facts, place / ATTRIBUTION))
    return written


def _check(evidence: Evidence, facts: Facts) -> None:
    """Photographs, weights and numbers belong to each other.

    Raises:
        ChainBroken: they do not.
    """
    lock = evidence.lock
    around = [[stage for stage in stages if stage in lock] for stages in (_BEFORE, _AFTER)]
    chain = locked_chain(lock, [*around[0], *CHAIN, *around[1]])
    made = {path: md5 for link in chain for path, md5 in link["outputs"].items()}
    numbers = ("data/select/summary.json", "data/evaluate/metrics.json")
    for path in (*(str(one.path) for one in facts.slices), *numbers):
        if path in made:
            check_file(evidence.root, path, made[path])
    for weights in facts.weights:
        check_weights(evidence, str(weights.path), made[str(weights.path)])
    judged = (facts.decision or {}).get("digests", {})
    if any(judged.get(one.name, one.sha256) != one.sha256 for one in facts.weights):
        raise ChainBroken(
            "data/promote/decision.json is about other weights than there are now: run "
            "`ultraflux run`"
        )


def _attribution(facts: Facts, path: Path) -> Path:
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(facts.credits)
    return path


def _origin(evidence: Evidence) -> Origin:
    root = evidence.root
    runs = {stage: run for stage in STAGES if (run := _maker(evidence, stage)) is not None}
    trained = runs.get("dit_stage2")
    cut = runs.get("slices")
    # A result that came over a remote has no record: its file knows when it came.
    moment = cut.started_ms / 1000 if cut is not None and cut.started_ms else None
    if moment is None:
        manifest = root / "data/slices/manifest.parquet"
        moment = manifest.stat().st_mtime if manifest.is_file() else 0.0
    lock = root / "requirements.lock"
    return Origin(
        published=datetime.fromtimestamp(moment, UTC).date().isoformat(),
        commit=trained.tags.get("mlflow.source.git.commit", "") if trained else "",
        runs={stage: run.name for stage, run in runs.items()},
        packages=locked_packages(lock.read_text(encoding="utf-8")) if lock.is_file() else {},
        lock_sha256=file_digest(lock) if lock.is_file() else "",
    )


def _maker(evidence: Evidence, stage: str) -> StageRun | None:
    """The newest run whose outputs are those of dvc.lock."""
    outputs = out_hashes(evidence.lock.get(stage, {}))
    made = [run for run in evidence.runs if run.stage == stage and run.outputs == outputs]
    return made[-1] if made and outputs else None
