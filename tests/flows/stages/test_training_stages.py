"""What the stages of training write is what three lines of Python write."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.corpus.manifest import write_table
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from components.training.dit.curves import write_outcome
from components.training.dit.job import stage_job
from components.training.dit.worker import run_job as train_dit
from components.training.encoding.embedded_captions import embed_captions
from components.training.encoding.encoded_slices import ENCODED_SLICES, encode_slices
from components.training.encoding.latent_summary import write_summary
from components.training.vae.job import slices_job
from components.training.vae.worker import run_job as train_vae
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[3]
BUCKETS = ((96, 160), (128, 128))

pytestmark = pytest.mark.usefixtures("training_environment_restored")


def small_settings() -> Settings:
    """The committed settings, with the smallest networks and two steps a stage."""
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    steps = {"steps": 2, "checkpoint_every": 1}
    values["vae"] |= steps | {"crop_px": 64, "batch_size": 2, "micro_batch_size": 2}
    values["vae"] |= {"eval_crops": 1, "eval_every": 2}
    for stage in ("dit_stage1", "dit_stage2"):
        values[stage] |= steps | {"global_batch_size": 2, "micro_batch_size": 2}
        values[stage] |= {"validate_every": 2, "validation_repeats": 1, "warmup_steps": 1}
        values[stage]["samples"]["every"] = None
    values["models"]["autoencoder"]["tiny"] |= {"block_out_channels": [8, 8, 16, 16]}
    values["models"]["autoencoder"]["tiny"] |= {"norm_num_groups": 4}
    values["models"]["transformer"]["tiny"] |= {"num_single_layers": 1, "num_attention_heads": 2}
    values["models"]["text_encoders"]["tiny"] |= {"t5_dim": 16, "clip_dim": 16, "vocab_size": 300}
    values["models"]["text_encoders"]["max_sequence_length"] = 8
    return parse_settings(values)


def run(stage: str, root: Path) -> StageResult:
    state = root / "runs" / stage
    context = StageContext(stage, small_settings(), root, state, MetricLog(state / "metrics.jsonl"))
    return importlib.import_module(f"flows.stages.{stage}").run(context)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs, the slices of them, and what the four stages before `generate` made."""
    root = tmp_path_factory.mktemp("project")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(5):
        height, width = BUCKETS[number % 2]
        path = root / "photos" / f"{number}.png"
        pixels = rng.integers(0, 256, (height + 8, width + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append(
            {
                "image_id": hashlib.sha256(path.read_bytes()).hexdigest(),
                "split": "eval" if number == 0 else "train",
                "uri": f"photos/{number}.png",
                "bucket_height": height,
                "bucket_width": width,
                "caption_en": f"coloured noise number {number}",
            }
        )
    table = pd.DataFrame(rows)
    train = table[table["split"] == "train"]
    slices = {"stage1": train, "stage2": train[:3], "vae": train, "manifest": table}
    slices["eval"] = table[table["split"] == "eval"]
    (root / "data" / "slices").mkdir(parents=True)
    for name, rows_of in slices.items():
        write_table(rows_of, root / "data" / "slices" / f"{name}.parquet")
    return root


@pytest.fixture(scope="module")
def stores(project: Path) -> Path:
    """The project with latents and text embeddings."""
    for stage in ("latents", "text_embeddings"):
        run(stage, project)
    return project


def test_latents_from_python_are_those_of_the_stage(stores: Path, tmp_path: Path) -> None:
    slices = [stores / "data" / "slices" / name for name in ENCODED_SLICES]
    out = tmp_path / "latents"
    store = encode_slices(
        small_settings(), slices, root=stores, state_dir=tmp_path / "state", destination=out
    )
    summary = write_summary(store, out)
    assert summary["images"] == 5
    assert contents(out) == contents(stores / "data" / "latents")


def test_embeddings_from_python_are_those_of_the_stage(stores: Path, tmp_path: Path) -> None:
    manifest, out = stores / "data" / "slices" / "manifest.parquet", tmp_path / "texts"
    store = embed_captions(
        small_settings(), manifest, root=stores, state_dir=tmp_path / "state", destination=out
    )
    assert len(store.index) == 6
    assert contents(out) == contents(stores / "data" / "text_embeddings")


@pytest.fixture(scope="module")
def decoder(project: Path) -> StageResult:
    """What the stage `vae` says; its files are in the project."""
    return run("vae", project)


def test_a_decoder_trained_from_python_is_that_of_the_stage(
    project: Path, decoder: StageResult, tmp_path: Path
) -> None:
    slices = project / "data" / "slices"
    job = slices_job(
        small_settings(),
        root=project,
        training=slices / "vae.parquet",
        held_out=slices / "eval.parquet",
        tiles_dir=tmp_path / "tiles",
        state_dir=tmp_path / "state",
        export_dir=tmp_path / "vae",
        metrics=tmp_path / "metrics.jsonl",
    )
    train_vae(job)
    assert contents(tmp_path / "vae") == contents(project / "data" / "vae")
    assert decoder.summary.startswith("2 steps, held-out PSNR ")


@pytest.mark.usefixtures("decoder")
def test_a_panorama_in_the_slice_is_left_out_and_counted(project: Path, tmp_path: Path) -> None:
    """One of 2048x70: 35 rows with a long edge of 16 crops, and a crop takes 64."""
    shutil.copytree(project / "data" / "slices", tmp_path / "data" / "slices")
    (tmp_path / "photos").symlink_to(project / "photos")
    path = tmp_path / "panorama.png"
    Image.new("RGB", (2048, 70), (90, 120, 60)).save(path)
    name = hashlib.sha256(path.read_bytes()).hexdigest()
    table = pd.read_parquet(project / "data" / "slices" / "vae.parquet")
    row = table.iloc[:1].assign(image_id=name, uri="panorama.png")
    slices = tmp_path / "data" / "slices"
    write_table(pd.concat([table, row]), slices / "vae.parquet")
    result = run("vae", tmp_path)
    assert result.metrics["left_out_narrow"] == 1
    assert result.metrics["left_out_undecodable"] == 0
    assert result.summary.endswith("; left out: 1 too narrow for a crop (left_out.csv)")
    left_out = pd.read_csv(tmp_path / "data" / "vae" / "left_out.csv")
    assert left_out[["slice", "image_id", "name", "kind"]].to_numpy().tolist() == [
        ["vae", name, "panorama.png", "narrow"]
    ]
    # The others are trained on as if it had never been there.
    trained = [root / "data" / "vae" / "history.csv" for root in (project, tmp_path)]
    assert len({path.read_text() for path in trained}) == 1
    # Nothing else is left: one line, and no traceback.
    write_table(row, slices / "vae.parquet")
    said = r"^vae: data/slices/vae\.parquet: none of 1 photographs .* first panorama\.png: 70x2048"
    with pytest.raises(StageFailed, match=said):
        run("vae", tmp_path)


@pytest.mark.usefixtures("decoder")
def test_tiles_are_cut_once_whatever_else_is_trained(project: Path) -> None:
    tiles = project / "runs" / "vae_tiles"
    before = {path: path.stat().st_mtime_ns for path in tiles.rglob("*") if path.is_file()}
    assert len([path for path in before if path.name == "index.parquet"]) == 2
    (project / "runs" / "vae").rename(project / "runs" / "vae_earlier")
    run("vae", project)
    assert before == {path: path.stat().st_mtime_ns for path in tiles.rglob("*") if path.is_file()}


def test_both_stages_trained_from_python_are_those_of_the_pipeline(
    stores: Path, tmp_path: Path
) -> None:
    before = None
    for stage in ("dit_stage1", "dit_stage2"):
        result = run(stage, stores)
        out = tmp_path / stage
        job = stage_job(
            stage,
            small_settings(),
            root=stores,
            latents=stores / "data" / "latents",
            texts=stores / "data" / "text_embeddings",
            train_slice=stores / "data" / "slices" / f"stage{stage[-1]}.parquet",
            before=before,
            state_dir=tmp_path / "state" / stage,
            export_dir=out,
            metrics=tmp_path / f"{stage}.jsonl",
        )
        train_dit(job)
        outcome = write_outcome(job)
        assert outcome.metrics == result.metrics
        assert contents(out) == contents(stores / "data" / stage)
        before = out / "ema"
    assert result.tags["train_slice.images"] == "3"


def test_problems_of_the_slices_are_one_line_with_the_stage_in_front(
    project: Path, tmp_path: Path
) -> None:
    table = pd.read_parquet(project / "data" / "slices" / "manifest.parquet")
    (tmp_path / "data" / "slices").mkdir(parents=True)
    for name in ("vae", "eval", "stage1"):
        write_table(table[:0], tmp_path / "data" / "slices" / f"{name}.parquet")
    silent = table.assign(caption_en=" ")
    write_table(silent, tmp_path / "data" / "slices" / "manifest.parquet")
    for stage, said in {
        "vae": "^vae: data/slices/vae.parquet is empty; relax",
        "latents": "^latents: the slices are empty; relax",
        "text_embeddings": "^text_embeddings: 5 rows have no English caption, first image",
    }.items():
        with pytest.raises(StageFailed, match=said):
            run(stage, tmp_path)
