"""Walks between photographs, runs, weights and pictures, on a project with true-format files."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from components.corpus.manifest import write_table
from components.files.weight_folders import file_digest, folder_digest
from components.generation.image_metadata import save_with_metadata
from components.generation.sampling import Generation
from flows.history.lineage import Lineage, Node
from flows.history.lineage_targets import TargetUnknown, explain
from flows.history.run_evidence import Evidence
from flows.records.records import RunDescription, RunResult, open_record
from flows.tracking.uploader import Uploader


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def record(
    root: Path,
    stage: str,
    started_ms: int,
    inputs: dict[str, str],
    outputs: dict[str, str],
    tags: dict[str, str] | None = None,
    promotions: list[dict[str, Any]] | None = None,
) -> str:
    made = open_record(
        root,
        RunDescription(
            kind="stage",
            name=stage,
            stage_key=f"{stage}-key",
            inputs=inputs,
            tags={"mlflow.source.git.commit": "c0ffee", "ultraflux.stage": stage},
            started_ms=started_ms,
        ),
    )
    result = RunResult(
        status="FINISHED", tags=tags or {}, promotions=promotions or [], ended_ms=started_ms + 1
    )
    made.finish(result)
    made.set_outputs(outputs)
    return made.record_id


@pytest.fixture
def trained(toy: Path) -> Path:
    """Three photographs (one rejected, one held out), two training stages, one picture."""
    rows = []
    for index, name in enumerate(("tree", "sea", "blur")):
        photo = toy / "photos" / f"{name}.png"
        photo.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index * 40, 90, 10)).save(photo)
        rows.append(
            {
                "image_id": file_digest(photo),
                "uri": f"photos/{name}.png",
                "license": "CC0-1.0",
                "image_url": f"https://example.org/{name}",
                "caption_en": f"a {name}",
                "kept": name != "blur",
                "reject_reason": "entropy" if name == "blur" else None,
                "split": {"tree": "train", "sea": "eval"}.get(name),
            }
        )
    table = pd.DataFrame(rows)
    (toy / "data" / "slices").mkdir()
    parts = {"manifest": table, "stage1": table[:1], "stage2": table[:1], "eval": table[1:2]}
    slices = {}
    for name, part in parts.items():
        path = toy / "data" / "slices" / f"{name}.parquet"
        write_table(part, path)
        slices[f"data/slices/{name}.parquet"] = md5(path)
    digests = {}
    for stage in ("dit_stage1", "dit_stage2"):
        folder = toy / "data" / stage / "ema"
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(stage.encode())
        digests[stage] = folder_digest(folder)
    record(toy, "slices", 1, {"data/caption/manifest.parquet": "0"}, slices)
    dit1, dit2 = {"data/dit_stage1/ema": "1.dir"}, {"data/dit_stage2/ema": "2.dir"}

    def cut(name: str) -> dict[str, str]:
        return {f"data/slices/{name}.parquet": slices[f"data/slices/{name}.parquet"]}

    past = {
        f"segments.{number}": f"{number:016x} from step {10 * number}" for number in (1, 2, 10)
    } | {"divergence.1": "step 7: loss is not finite; step 7 left out", "segments.of": "no number"}
    weights = {"weights.ema": digests["dit_stage1"]}
    record(toy, "dit_stage1", 2, cut("stage1"), dit1, weights | past)
    record(toy, "dit_stage2", 3, cut("stage2") | dit1, dit2, {"weights.ema": digests["dit_stage2"]})
    picture = toy / "data" / "generate" / "images" / "prompt00_32x32.png"
    picture.parent.mkdir(parents=True)
    transformer = {"transformer": digests["dit_stage2"]}
    fields = {"prompt": "a sea", "sha256_transformer": digests["dit_stage2"], "ultraflux_key": "k"}
    save_with_metadata(Image.new("RGB", (32, 32)), picture, fields)
    line = Generation(
        prompt="a sea",
        file=picture.name,
        seed=1,
        height=32,
        width=32,
        image_sha256=file_digest(picture),
        source_image_id=rows[1]["image_id"],
        key="k",
        digests=transformer,
    )
    log = toy / "data" / "generate" / "generations.jsonl"
    log.write_text(json.dumps(asdict(line)) + "\n")
    record(
        toy,
        "generate",
        4,
        dit2 | cut("eval"),
        {"data/generate/generations.jsonl": md5(log)},
        {"sha256.transformer": digests["dit_stage2"]},
    )
    promotion = {
        "model": "toy-transformer",
        "path": "data/dit_stage2/ema",
        "digest": digests["dit_stage2"],
        "alias": "candidate",
        "tags": {},
    }
    record(toy, "promote", 5, {}, {"data/promote/decision.json": "3"}, promotions=[promotion])
    return toy


def walk(root: Path, target: str | Path, *, limit: int = 10, mlflow: bool = False) -> Node:
    return explain(Lineage(Evidence(root, mlflow=mlflow), limit=limit), str(target))


def titles(node: Node, kind: str) -> list[str]:
    return [step.title for step in node.walk() if step.kind == kind]


def test_a_picture_leads_to_its_weights_its_runs_and_the_photographs_they_saw(
    trained: Path,
) -> None:
    node = walk(trained, trained / "data/generate/images/prompt00_32x32.png")
    stages = [title.split()[0] for title in titles(node, "run")]
    assert stages.count("dit_stage2") == stages.count("dit_stage1") == 1
    assert titles(node, "version") == ["toy-transformer, version unknown (candidate)"]
    # The prompt's photograph first, then what the two stages were trained on.
    assert titles(node, "photograph") == ["photos/sea.png", "photos/tree.png"]
    photo = next(step for step in node.walk() if step.title == "photos/tree.png")
    assert photo.facts["license"] == "CC0-1.0"
    assert photo.facts["image_url"] == "https://example.org/tree"
    assert photo.facts["original"] == "here, sha256 checked"
    assert titles(node, "missing") == []
    run = next(step for step in node.walk() if step.title.startswith("dit_stage2"))
    assert run.facts["commit"] == "c0ffee"


def test_a_picture_whose_metadata_was_removed_is_known_by_nothing_and_says_so(
    trained: Path, tmp_path: Path
) -> None:
    Image.open(trained / "data/generate/images/prompt00_32x32.png").convert("RGB").save(
        tmp_path / "bare.png"
    )
    with pytest.raises(TargetUnknown, match="was the metadata removed"):
        walk(trained, tmp_path / "bare.png")


def test_a_photograph_leads_forward_to_the_pictures_of_the_models_trained_on_it(
    trained: Path,
) -> None:
    node = walk(trained, trained / "photos" / "tree.png")
    assert titles(node, "slice") == ["data/slices/stage1.parquet", "data/slices/stage2.parquet"]
    assert titles(node, "picture") == ["prompt00_32x32.png"]
    held_out = walk(trained, trained / "photos" / "sea.png")
    assert titles(held_out, "slice") == ["data/slices/eval.parquet"]
    assert titles(held_out, "picture") == ["prompt00_32x32.png"]  # its caption is the prompt
    assert titles(held_out, "weights") == []
    rejected = walk(trained, trained / "photos" / "blur.png")
    assert rejected.children[0].facts["reject_reason"] == "entropy"
    assert titles(rejected, "slice") == []


def test_changed_bytes_of_an_original_are_noticed_in_both_directions(trained: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(trained / "photos" / "tree.png")
    node = walk(trained, "dit_stage2")
    photo = next(step for step in node.walk() if step.kind == "photograph")
    assert photo.facts["original"].startswith("not here: the file no longer holds these bytes")
    forth = walk(trained, trained / "photos" / "tree.png")
    assert "other bytes" in forth.facts["warning"]


def test_weights_are_found_by_folder_digest_and_model_name(trained: Path) -> None:
    digest = folder_digest(trained / "data/dit_stage2/ema")
    for target in (trained / "data/dit_stage2/ema", digest[:12], "toy-transformer@candidate"):
        node = walk(trained, target)
        assert node.facts["sha256"] == digest
        assert any(title.startswith("dit_stage2") for title in titles(node, "run"))


def test_a_folder_without_weights_is_no_target(trained: Path) -> None:
    with pytest.raises(TargetUnknown, match="a folder without weights"):
        walk(trained, trained / "photos")


def test_rows_that_are_gone_are_named_with_what_brings_them(trained: Path) -> None:
    (trained / "data/slices/stage2.parquet").unlink()
    node = walk(trained, "dit_stage2")
    lost = next(step for step in node.walk() if step.kind == "missing")
    assert "data/slices/stage2.parquet" in lost.title
    assert "dvc fetch" in lost.facts["fix"]


def test_the_limit_cuts_rows_and_says_how_many(trained: Path) -> None:
    path = trained / "data/slices/stage1.parquet"
    table = pd.concat([pd.read_parquet(path)] * 3, ignore_index=True)
    write_table(table, path)
    record(trained, "dit_stage1", 9, {"data/slices/stage1.parquet": md5(path)}, {})
    node = walk(trained, "dit_stage1", limit=1)
    assert "2 more (--limit)" in titles(node, "row")


def test_with_mlflow_the_registered_version_and_runs_of_other_clones_are_found(
    trained: Path, give_store: Callable[[Path], None]
) -> None:
    give_store(trained)
    Uploader(trained).sync()
    node = walk(trained, "models:/toy-transformer@candidate", mlflow=True)
    assert titles(node, "version") == ["toy-transformer version 1 (candidate)"]
    run_id = next(step.facts["run_id"] for step in node.walk() if step.kind == "run")
    # Another clone has the tracking store, not the records.
    (trained / "runs" / "records").rename(trained / "runs" / "elsewhere")
    again = walk(trained, run_id, mlflow=True)
    assert again.title.startswith("dit_stage2")
    assert "photos/tree.png" in titles(again, "photograph")


def test_the_command_prints_a_tree_or_json_and_one_line_for_the_unknown(
    trained: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    def ultraflux(*arguments: str) -> subprocess.CompletedProcess[str]:
        return typed(trained, "lineage", "--no-mlflow", *arguments)

    shown = ultraflux("data/generate/images/prompt00_32x32.png")
    assert shown.returncode == 0, shown.stderr
    assert "photos/tree.png" in shown.stdout
    document = json.loads(ultraflux("dit_stage1", "--json").stdout)
    assert document["kind"] == "run"
    assert document["facts"]["data_in"]
    past = {k: v for k, v in document["facts"].items() if k.startswith(("segments", "diver"))}
    numbered = [f"segments.{number}" for number in (1, 2, 10)]
    assert list(past) == ["divergence.1", *numbered]
    for text in (shown.stdout, ultraflux("dit_stage1").stdout):
        places = [text.index(f"{name} {past[name]}") for name in past]
        assert places == sorted(places)
    unknown = ultraflux("nothing-of-that-name")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "stages with runs: dit_stage1" in unknown.stderr
