"""The last stages do no more than their library calls: the same bytes from a Python prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.pipeline_evaluation import validation_loss
from components.evaluation.statistics.gate import decide
from components.models.text_encoders import build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.settings.schema import Settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import evaluate, generate, promote
from flows.stages.contract import StageContext, StageFailed
from flows.versioning.setting_overrides import read_params

CAPTIONS = ["A lake under clouds.", "Red leaves on a wall."]


def small_project(root: Path, folder: Path) -> Settings:
    """What the stages before `generate` would leave, with tiny random models; the settings."""
    params = read_params(root)
    params["generate"] |= {"sizes": [[64, 96]], "prompts": 2, "num_inference_steps": 2}
    params["generate"]["twins"] = 2
    params["evaluate"] |= {"reconstruction_images": 1, "bootstrap_resamples": 100}
    settings = parse_settings(params)
    data = folder / "data"
    rows = []
    for number, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 120, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        row = {"image_id": hashlib.sha256(path.read_bytes()).hexdigest(), "uri": path.name}
        rows.append(row | {"caption_en": caption, "bucket_height": 64, "bucket_width": 96})
    (data / "slices").mkdir(parents=True)
    for name in ("eval", "stage1"):
        pd.DataFrame(rows).to_parquet(data / "slices" / f"{name}.parquet", index=False)
    build_tiny_autoencoder(seed=5).save_pretrained(data / "vae" / "autoencoder")
    build_tiny_text_encoders(
        data / "text_embeddings" / "encoders", CAPTIONS, t5_dim=32, clip_dim=32
    )
    transformer = build_tiny_transformer(
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32
    )
    transformer.save_pretrained(data / "dit_stage2" / settings.generate.weights)
    for stage, loss in (("dit_stage1", 2.0), ("dit_stage2", 1.5)):
        (data / stage).mkdir(exist_ok=True)
        losses = {"validation_loss_first": loss, "validation_loss_last": loss - 0.5}
        (data / stage / "metrics.json").write_text(json.dumps(losses))
    (folder / "mlflow").mkdir()
    (folder / "mlflow/tracking.yaml").write_bytes((root / "mlflow/tracking.yaml").read_bytes())
    return settings


def context(stage: str, folder: Path, settings: Settings) -> StageContext:
    state = folder / "runs" / stage
    state.mkdir(parents=True, exist_ok=True)
    return StageContext(stage, settings, folder, state, MetricLog(state / "metrics.jsonl"))


def written(folder: Path) -> dict[str, bytes]:
    """Every file of the three stages."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for stage in ("generate", "evaluate", "promote")
        for path in sorted((folder / "data" / stage).rglob("*"))
        if path.is_file()
    }


def test_three_lines_at_a_prompt_do_what_each_stage_does(root: Path, tmp_path: Path) -> None:
    from components.evaluation.pipeline_evaluation import evaluate_pipeline
    from components.evaluation.promotion_decision import decide_promotion, write_decision
    from components.generation.held_out_images import generate_held_out

    staged, plain = tmp_path / "staged", tmp_path / "plain"
    settings = small_project(root, staged)
    small_project(root, plain)
    for module in (generate, evaluate, promote):
        name = module.__name__.rsplit(".", 1)[-1]
        result = module.run(context(name, staged, settings))
        assert all(path.exists() for path in result.artifacts)

    for name in ("generate", "evaluate", "promote"):
        (plain / "data" / name).mkdir()
    images = generate_held_out(plain, settings, finished=plain / "drafts")
    images.write(plain / "data" / "generate")
    evaluate_pipeline(plain, settings).write(plain / "data" / "evaluate")
    write_decision(decide_promotion(plain, settings), plain / "data" / "promote")

    expected = written(staged)
    assert {name.split("/")[1] for name in expected} == {"generate", "evaluate", "promote"}
    assert len(expected) == 2 + 2 + 3 + 3 + 2
    assert written(plain) == expected


@pytest.mark.parametrize(
    ("module", "gone"),
    [
        (generate, "vae/autoencoder"),
        (evaluate, "generate/generations.jsonl"),
        (promote, "evaluate/metrics.json"),
    ],
)
def test_a_missing_input_is_named_with_the_command_that_makes_it(
    module: type, gone: str, root: Path, tmp_path: Path
) -> None:
    settings = parse_settings(read_params(root))
    needed = ("slices/eval.parquet", "slices/stage1.parquet", "vae/autoencoder", "dit_stage2/ema")
    for name in needed:
        if name != gone:
            (tmp_path / "data" / name).mkdir(parents=True)
    name = module.__name__.rsplit(".", 1)[-1]
    with pytest.raises(StageFailed, match=rf"^{name}: input data/{gone} is missing; run the stage"):
        module.run(context(name, tmp_path, settings))


def test_without_the_loss_before_training_there_is_no_fall_and_the_gate_refuses(
    root: Path, tmp_path: Path
) -> None:
    for stage, losses in (
        ("dit_stage1", {"validation_loss_last": 1.0, "training_images_loss_last": 0.5}),
        ("dit_stage2", {"validation_loss_last": 0.5}),
    ):
        (tmp_path / "data" / stage).mkdir(parents=True)
        (tmp_path / "data" / stage / "metrics.json").write_text(json.dumps(losses))
    found = validation_loss(tmp_path)
    assert found == {"validation_loss_last": 0.5, "training_images_loss_last": 0.5}
    asked = {"min_validation_loss_drop": 0.0, "min_training_images_loss_drop": 0.0}
    rules = decide(found, parse_settings(read_params(root)).promote.model_copy(update=asked))
    failed = {rule["name"] for rule in rules["rules"] if not rule["passed"]}
    assert failed >= {"validation_loss_drop", "training_images_loss_drop"}


def test_without_any_caption_there_is_nothing_to_paint(root: Path, tmp_path: Path) -> None:
    settings = small_project(root, tmp_path)
    table = tmp_path / "data" / "slices" / "eval.parquet"
    pd.read_parquet(table).assign(caption_en="").to_parquet(table, index=False)
    with pytest.raises(StageFailed, match=r"^generate: data/slices/eval.parquet holds no caption"):
        generate.run(context("generate", tmp_path, settings))
