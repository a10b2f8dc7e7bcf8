"""Settings that are right one by one and wrong together: each pair beside one that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.settings.schema import SettingsError, parse_settings

ROOT = Path(__file__).resolve().parents[3]
BF16 = {"dit_stage1.precision": "bf16", "dit_stage1.zero_stage": 2}
FP32 = {"dit_stage1.precision": "fp32"}
RAY = {"runtime.engine": "ray", "runtime.device": "cuda"}
MADE_HERE = {"caption.translate.provider": "none"}
QUOTA = {"name": "wide", "min_ratio": 1.2, "max_ratio": 2.0, "min_share": 0.1, "max_share": 0.5}
# What is refused, a part of its line, and what lies beside it and is taken.
WRONG: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"dit_stage1.sigma_range": [0.5, 0.5]},
        "sigma_range [0.5, 0.5] must be increasing",
        {"dit_stage1.sigma_range": [0.5, 0.6]},
    ),
    (
        {"dit_stage1.global_batch_size": 6, "dit_stage1.micro_batch_size": 4},
        "global_batch_size 6 must be a multiple of micro_batch_size 4",
        {"dit_stage1.global_batch_size": 8, "dit_stage1.micro_batch_size": 4},
    ),
    (
        {"dit_stage1.precision": "bf16", "dit_stage1.zero_stage": 0},
        "zero_stage 0 keeps no float32 masters of bf16 weights",
        {"dit_stage1.precision": "bf16", "dit_stage1.zero_stage": 1},
    ),
    (
        {
            "dit_stage1.offload_activations": True,
            "dit_stage1.gradient_checkpointing": "selective",
        },
        "gradient_checkpointing is 'selective'",
        {"dit_stage1.offload_activations": True, "dit_stage1.gradient_checkpointing": "blocks"},
    ),
    (
        BF16 | {"dit_stage1.offload_optimizer": "cpu", "dit_stage1.zero_stage": 1},
        "offload_optimizer 'cpu' needs zero_stage 2 or 3, not 1",
        BF16 | {"dit_stage1.offload_optimizer": "cpu"},
    ),
    (
        BF16 | {"dit_stage1.offload_optimizer": "cpu", "dit_stage1.optimizer": "adamw_8bit"},
        "optimizer 'adamw_8bit' updates on the GPU",
        BF16 | {"dit_stage1.optimizer": "adamw_8bit"},
    ),
    (
        FP32 | {"dit_stage1.optimizer": "adafactor", "dit_stage1.zero_stage": 1},
        "optimizer 'adafactor' needs whole matrices, and zero_stage 1 cuts them",
        FP32 | {"dit_stage1.optimizer": "adafactor", "dit_stage1.zero_stage": 0},
    ),
    (
        {"vae.tile_px": 128, "vae.crop_px": 160},
        "crop_px 160 must not exceed tile_px 128",
        {"vae.tile_px": 160, "vae.crop_px": 160},
    ),
    (
        {"runtime.nodes": 2},
        "runtime.nodes = 2 needs runtime.rendezvous_endpoint",
        {"runtime.nodes": 2, "runtime.rendezvous_endpoint": "10.0.0.1:29500"},
    ),
    (
        {"runtime.processes": 3, "runtime.context_parallel_degree": 2},
        "runtime.context_parallel_degree 2 does not divide the 3 ranks",
        {"runtime.processes": 4, "runtime.context_parallel_degree": 2},
    ),
    (
        RAY | {"runtime.gpus_per_actor": 0.0},
        "runtime.gpus_per_actor must be above 0",
        RAY | {"runtime.gpus_per_actor": 0.5},
    ),
    (
        RAY | {"runtime.gpus_per_actor": 1.5},
        "runtime.gpus_per_actor must be a whole number",
        RAY | {"runtime.gpus_per_actor": 2.0},
    ),
    (
        MADE_HERE | {"caption.provider": "endpoint", "caption.endpoint": None},
        "caption.endpoint must be given",
        {},
    ),
    (
        MADE_HERE | {"caption.provider": "local", "caption.local": None},
        "caption.local must be given",
        {},
    ),
    (
        MADE_HERE | {"caption.provider": "fixed", "caption.text": "  "},
        "caption.text must say something",
        MADE_HERE | {"caption.provider": "fixed", "caption.text": "a photograph"},
    ),
    (
        {
            "caption.provider": "fixed",
            "caption.text": "a photograph",
            "caption.translate.provider": "shipped",
        },
        "caption.translate.provider 'shipped' needs caption.provider 'shipped'",
        {},
    ),
    (
        {"caption.provider": "shipped", "caption.provided": "ignore"},
        "caption.provided 'ignore' needs another caption.provider",
        {},
    ),
    (
        {"people.detector": "table", "people.boxes": None},
        "people.boxes must name a file",
        {},
    ),
    (
        {"people.detector": "owlv2", "people.weights": None},
        "people.weights must be set when people.detector is owlv2",
        {"people.detector": "owlv2", "people.weights": "weights/owlv2"},
    ),
    (
        {"people.nsfw.scorer": "classifier", "people.nsfw.weights": None},
        "people.nsfw.weights must name a folder",
        {"people.nsfw.scorer": "classifier", "people.nsfw.weights": "weights/nsfw"},
    ),
    (
        {"select.aspect_quotas": [QUOTA | {"max_ratio": 1.2}]},
        "min_ratio 1.2 must be below max_ratio 1.2",
        {"select.aspect_quotas": [QUOTA]},
    ),
    (
        {"select.aspect_quotas": [QUOTA | {"max_share": 0.05}]},
        "min_share 0.1 must not exceed max_share 0.05",
        {"select.aspect_quotas": [QUOTA | {"max_share": 0.1}]},
    ),
    (
        {"caption.min_words": 60, "caption.max_words": 10},
        "caption: min_words 60 must not exceed max_words 10",
        {"caption.min_words": 10, "caption.max_words": 10},
    ),
    (
        {"refiner.min_words": 60, "refiner.max_words": 10},
        "refiner: min_words 60 must not exceed max_words 10",
        {"refiner.min_words": 10, "refiner.max_words": 10},
    ),
    (
        {"select.aspect_quotas": [QUOTA | {"min_share": 0.4}] * 3},
        "min_share of aspect_quotas add up to 1.2",
        {"select.aspect_quotas": [QUOTA | {"min_share": 0.5}] * 2},
    ),
    (
        {"objective.snr_huber.c_min": 0.5, "objective.snr_huber.c_max": 0.4},
        "c_min 0.5 must not exceed c_max 0.4",
        {"objective.snr_huber.c_min": 0.5, "objective.snr_huber.c_max": 0.5},
    ),
]

# What is valid and cannot do what it says, and what lies beside it.
DOUBTFUL: list[tuple[dict[str, Any], tuple[str, str], dict[str, Any]]] = [
    (
        {"dit_stage2.steps": 5, "dit_stage2.warmup_steps": 20, "dit_stage2.learning_rate": 1e-4},
        (
            "dit_stage2",
            "warmup_steps 20 exceeds steps 5: learning_rate ends at 2.5e-05, not 0.0001",
        ),
        {"dit_stage2.steps": 5, "dit_stage2.warmup_steps": 5},
    ),
    (
        {"select.min_pixels": 2_000_001, "ingest.max_megapixels": 2.0},
        ("select", "min_pixels 2,000,001 exceeds ingest.max_megapixels 2: none can pass"),
        {"select.min_pixels": 2_000_000, "ingest.max_megapixels": 2.0},
    ),
    (
        {"promote.min_twin_psnr_db": 9.0, "generate.twins": 0},
        ("promote", "min_twin_psnr_db cannot be met: generate.twins is 0"),
        {"promote.min_twin_psnr_db": None, "generate.twins": 0},
    ),
    (
        {"dit_stage1.validation_training_images": 0},
        (
            "promote",
            "min_training_images_loss_drop cannot be met: dit_stage1.validation_training_images "
            "is 0",
        ),
        {
            "dit_stage1.validation_training_images": 0,
            "promote.min_training_images_loss_drop": None,
        },
    ),
]


def parsed(changes: dict[str, Any]) -> Any:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return parse_settings(values)


@pytest.mark.parametrize(("changes", "expected", "beside"), WRONG, ids=[row[1] for row in WRONG])
def test_what_does_not_fit_together_is_one_line_and_its_neighbour_is_taken(
    changes: dict[str, Any], expected: str, beside: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError) as caught:
        parsed(changes)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    parsed(beside)


@pytest.mark.parametrize(
    ("changes", "expected", "beside"), DOUBTFUL, ids=[row[1][1] for row in DOUBTFUL]
)
def test_what_cannot_be_reached_is_said_and_not_refused(
    changes: dict[str, Any], expected: tuple[str, str], beside: dict[str, Any]
) -> None:
    assert parsed(changes).doubts() == [expected]
    assert parsed(beside).doubts() == []
