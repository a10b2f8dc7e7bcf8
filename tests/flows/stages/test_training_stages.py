"""What the stages of training write is what three lines of Python write."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import T5TokenizerFast

from components.corpus.manifest import write_table
from components.models.text_encoders import encode_prompts, load_text_encoders
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from components.training.dit.curves import write_outcome
from components.training.dit.job import stage_job
from components.training.dit.worker import run_job as train_dit
from components.training.encoding.embedded_captions import embed_captions
from components.training.encoding.encoded_slices import (
    ENCODED_SLICES,
    encode_slices,
    rebuild_from_slices,
)
from components.training.encoding.latent_summary import write_summary
from components.training.encoding.own_prompts import prompt_id, read_own_prompts
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore
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


def run(stage: str, root: Path, settings: Settings | None = None) -> StageResult:
    state = root / "runs" / stage
    settings = settings or small_settings()
    context = StageContext(stage, settings, root, state, MetricLog(state / "metrics.jsonl"))
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


def test_the_posterior_of_the_settings_reaches_the_latents(stores: Path, tmp_path: Path) -> None:
    values = small_settings().model_dump(mode="json")
    values["latents"]["posterior"] = "sample"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "slices").symlink_to(stores / "data" / "slices")
    (tmp_path / "photos").symlink_to(stores / "photos")
    run("latents", tmp_path, parse_settings(values))
    drawn = LatentStore(tmp_path / "data" / "latents")
    seed = values["project"]["seed"]
    assert drawn.about["provenance"]["posterior"] == f"sample, seed {seed}"
    assert drawn.digest != LatentStore(stores / "data" / "latents").digest
    # A damaged shard is made again with the same draws.
    shard = str(drawn.index["shard"].iloc[0])
    before = (drawn.folder / shard).read_bytes()
    (drawn.folder / shard).write_bytes(bytes(len(before)))
    slices = [stores / "data" / "slices" / name for name in ENCODED_SLICES]
    rebuild_from_slices(parse_settings(values), slices, drawn, shard, root=tmp_path)
    assert (drawn.folder / shard).read_bytes() == before


def test_embeddings_from_python_are_those_of_the_stage(stores: Path, tmp_path: Path) -> None:
    manifest, out = stores / "data" / "slices" / "manifest.parquet", tmp_path / "texts"
    store = embed_captions(
        small_settings(), manifest, root=stores, state_dir=tmp_path / "state", destination=out
    )
    assert len(store.index) == 6
    assert contents(out) == contents(stores / "data" / "text_embeddings")


def test_captions_that_the_encoders_cut_are_counted_warned_of_and_stored(stores: Path) -> None:
    """8 positions of T5, and longer captions: by its own tokenizer all five are cut."""
    folder = stores / "data" / "text_embeddings"
    tokenizer = T5TokenizerFast.from_pretrained(folder / "encoders" / "tokenizer_2")
    captions = pd.read_parquet(stores / "data" / "slices" / "manifest.parquet")["caption_en"]
    sizes = [len(tokenizer(caption).input_ids) for caption in captions]
    assert min(sizes) > 8
    result = run("text_embeddings", stores)
    assert result.metrics["captions_cut_t5"] == 5
    assert result.metrics["captions_cut_clip"] == 0
    said = f"; warning: T5 cuts 5 of 5 captions at 8 tokens (the longest has {max(sizes)})"
    assert said in result.summary
    stored = TextStore(folder).about["provenance"]["caption_lengths"]["T5"]
    assert stored == {"limit": 8, "captions": 5, "cut": 5, "longest": max(sizes)}


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


@pytest.mark.slow
def test_prompts_of_ones_own_are_drawn_and_change_no_weight(
    stores: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The grid gets a row more, and the exported bytes are those of a run without."""
    (tmp_path / "data").mkdir()
    for name in ("slices", "latents", "text_embeddings"):
        (tmp_path / "data" / name).symlink_to(stores / "data" / name)
    values = small_settings().model_dump(mode="json")
    samples = {"every": 0, "prompts": 1, "num_inference_steps": 1, "guidance_scale": 1.0}
    grids, exports = [], []
    for own in ([], [{"prompt": "a red kite", "size": [64, 96]}, {"prompt": "noise"}]):
        values["dit_stage1"]["samples"] = samples | {"own_prompts": own}
        run("dit_stage1", tmp_path, parse_settings(values))
        state = tmp_path / "runs" / "dit_stage1"
        grids.append(Image.open(next((state / "samples").glob("*.png"))).size)
        exports.append(contents(tmp_path / "data" / "dit_stage1"))
        state.rename(tmp_path / f"state{len(own)}")
    assert grids[0] == (536, 536)
    assert grids[1] == (1024, 1024)
    assert exports[0] == exports[1]
    # As the captions were embedded, by the same encoders.
    encoders = load_text_encoders(stores / "data" / "text_embeddings" / "encoders")
    text, pooled = encode_prompts(encoders, ["a red kite"], 8)
    embedded = read_own_prompts(["a red kite"], tmp_path / "state2")[prompt_id("a red kite")]
    assert torch.equal(embedded[0], text[0])
    assert torch.equal(embedded[1], pooled[0])
    # Encoders that made another store: a line, and the grid of held-out captions alone.
    (tmp_path / "data" / "text_embeddings").unlink()
    shutil.copytree(stores / "data" / "text_embeddings", tmp_path / "data" / "text_embeddings")
    config = tmp_path / "data" / "text_embeddings" / "encoders" / "text_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    capfd.readouterr()
    run("dit_stage1", tmp_path, parse_settings(values))
    assert "no pictures of samples.own_prompts: the text encoders" in capfd.readouterr().err
    drawn = next((tmp_path / "runs" / "dit_stage1" / "samples").glob("*.png"))
    assert Image.open(drawn).size == grids[0]


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
