"""Papers through the command, each read by the reference implementation of its format."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlcroissant
import pandas as pd
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import DatasetCard, ModelCard
from recorded_project import ROWS, RecordedProject, image

from components.files.weight_folders import file_digest, folder_digest
from components.papers.cards import hub_license, split_card, table
from flows.records.provenance import locked_packages

ROOT = Path(__file__).parents[3]
CARD = """---
library_name: diffusers
license: other
license_name: flux-1-dev-non-commercial-license
base_model: black-forest-labs/FLUX.1-dev
ultraflux:
  steps: 60
---

# UltraFlux: dit_stage2

Trained from given weights.
"""
METRICS = {"validation_loss_drop": 0.25, "vae_psnr_gain_db": 11.5, "broken": float("nan")}
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(toy: Path) -> RecordedProject:
    made = RecordedProject(toy)
    made.train(ROWS, "papers")
    made.evaluate(METRICS, CARD)
    (toy / "requirements.lock").write_text((ROOT / "requirements.lock").read_text())
    (toy / "CITATION.cff").write_text((ROOT / "CITATION.cff").read_text())
    return made


@pytest.fixture
def papers(project: RecordedProject, typed: Typed) -> Path:
    done = typed(project.root, "papers", "--json")
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)
    assert all((project.root / path).is_file() for path in files)
    return project.root / "papers"


def test_mlcroissant_validates_the_corpus_and_reads_its_rows(
    project: RecordedProject, papers: Path
) -> None:
    dataset = mlcroissant.Dataset(jsonld=str(papers / "dataset" / "croissant.json"))
    assert not dataset.metadata.issues.errors
    assert not dataset.metadata.issues.warnings
    for name in ("stage1", "eval"):
        rows = list(dataset.records(name))
        expected = pd.read_parquet(project.root / f"data/slices/{name}.parquet")
        assert [row[f"{name}/image_id"].decode() for row in rows] == expected["image_id"].tolist()
        assert [row[f"{name}/width"] for row in rows] == expected["width"].tolist()
        captions = [row[f"{name}/caption_en"].decode() for row in rows]
        assert captions == expected["caption_en"].tolist()


def test_a_table_that_is_not_the_described_one_is_noticed(papers: Path) -> None:
    table = papers / "dataset" / "data" / "stage1.parquet"
    described = json.loads((papers / "dataset" / "croissant.json").read_text(encoding="utf-8"))
    digests = {one["@id"]: one["sha256"] for one in described["distribution"]}
    assert digests["stage1.parquet"] == file_digest(table)


def test_the_bill_of_materials_is_valid_and_names_weights_data_and_packages(
    project: RecordedProject, papers: Path
) -> None:
    text = (papers / "model" / "bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {one["bom-ref"]: one for one in json.loads(text)["components"]}
    weights = parts["weights:transformer"]
    assert weights["hashes"] == [
        {"alg": "SHA-256", "content": folder_digest(project.root / "data/dit_stage2/ema")}
    ]
    assert parts["data:stage1"]["hashes"][0]["content"] == file_digest(
        project.root / "data/slices/stage1.parquet"
    )
    locked = locked_packages((ROOT / "requirements.lock").read_text())
    named = {n.removeprefix("pkg:"): p["version"] for n, p in parts.items() if "pkg:" in n}
    assert named == locked
    links = {one["ref"]: one.get("dependsOn", []) for one in json.loads(text)["dependencies"]}
    assert "data:stage1" in links["weights:transformer"]


def test_the_model_card_is_that_of_training_with_what_came_after(papers: Path) -> None:
    path = papers / "model" / "README.md"
    card = ModelCard.load(path)
    assert card.data.license_name == "flux-1-dev-non-commercial-license"
    assert card.data.to_dict()["base_model_relation"] in {"finetune", "adapter"}
    assert card.data.datasets == ["ultraflux-corpus"]
    found = {one.metric_type: one.metric_value for one in card.data.eval_results or []}
    # A number that is none stands in no index.
    assert found == {name: value for name, value in METRICS.items() if name != "broken"}
    front, body = split_card(path.read_text(encoding="utf-8"))
    assert front["ultraflux"] == {"steps": 60}
    assert body.strip().startswith(split_card(CARD)[1].strip())
    assert "| CC-BY-SA-4.0 | https://creativecommons.org/licenses/by-sa/4.0/ | 1 |" in body
    assert "img.example.org | 3" in body
    assert "1 photographs are under licences that ask for themselves" in body


def test_the_dataset_card_and_attribution_are_of_the_photographs_that_are_used(
    papers: Path,
) -> None:
    card = DatasetCard.load(papers / "dataset" / "README.md")
    assert sorted(card.data.license) == ["cc-by-sa-4.0", "cc0-1.0", "unknown"]
    files = {one["config_name"]: one["data_files"][0] for one in card.data.to_dict()["configs"]}
    assert files["eval"] == {"split": "test", "path": "data/eval.parquet"}
    for place in ("dataset", "model"):
        with (papers / place / "ATTRIBUTION.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["image_id"] for row in rows} == {image(n) for n in ("tree", "sea", "hill")}
    assert "Ann Lee (Unsplash)" in {row["photographer"] for row in rows}


def test_equal_results_have_equal_papers(
    project: RecordedProject, papers: Path, typed: Typed
) -> None:
    before = {path: path.read_bytes() for path in papers.rglob("*") if path.is_file()}
    assert typed(project.root, "papers").returncode == 0
    assert before == {path: path.read_bytes() for path in papers.rglob("*") if path.is_file()}


def test_without_a_run_one_line_says_what_is_missing(toy: Path, typed: Typed) -> None:
    RecordedProject(toy)
    done = typed(toy, "papers")
    assert done.returncode == 2
    assert done.stderr == "error: data/slices/vae.parquet is missing: run `ultraflux run`\n"


def test_weights_that_learned_from_other_slices_get_no_papers(
    project: RecordedProject, typed: Typed
) -> None:
    """`ultraflux run --until slices` with other settings leaves the old weights in place."""
    table = pd.read_parquet(project.root / "data/slices/stage2.parquet")
    project.write("slices/stage2", table.iloc[:1])
    done = typed(project.root, "papers")
    assert done.returncode == 2
    assert "data/slices/stage2.parquet is not what dvc.lock says" in done.stderr
    cut = [one["path"] for one in project.lock["slices"]["outs"]]
    project.run("slices", ["data/ingest/manifest.parquet"], cut)
    done = typed(project.root, "papers")
    assert done.returncode == 2
    assert done.stderr == (
        "error: dit_stage2 read another data/slices/stage2.parquet than there is now: run "
        "`ultraflux run`\n"
    )
    assert not (project.root / "papers").exists()


def test_other_weights_than_were_trained_or_judged_get_no_papers(
    project: RecordedProject, typed: Typed
) -> None:
    decision = project.root / "data/promote/decision.json"
    decision.parent.mkdir()
    judged = {"digests": {"transformer": "0" * 64}, "rules": [], "promoted": True}
    decision.write_text(json.dumps(judged))
    assert "decision.json is about other weights" in typed(project.root, "papers").stderr
    decision.unlink()
    (project.root / "data/dit_stage2/ema/w.safetensors").write_text("another")
    assert "data/dit_stage2/ema is not what dvc.lock" in typed(project.root, "papers").stderr


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("CC-BY-SA-4.0", "cc-by-sa-4.0"),
        ("CC0-1.0", "cc0-1.0"),
        ("unknown", "unknown"),
        ("public-domain", "other"),
        ("CC-BY", "other"),
    ],
)
def test_licences_as_hubs_list_them(name: str, hub: str) -> None:
    assert hub_license(name) == hub


def test_a_cell_breaks_no_table() -> None:
    assert table(("a",), [("x | y\nz",)]) == "| a |\n| --- |\n| x \\| y z |\n"
