"""Which settings are part of a training run's identity: every class of them by name."""

from __future__ import annotations

import pytest
import yaml

from components.settings.effects import (
    deciding,
    effect,
    naming,
    only_seen,
    shapes_state,
)
from components.settings.section import Effect
from flows.versioning.parameters import flatten


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"dit_stage1.{name}"
            for name in (
                "validate_every",
                "validation_repeats",
                "validation_training_images",
                "watch_every",
                "checkpoint_every",
                "keep_checkpoints",
                "async_checkpoints",
                "max_shard_gb",
                "samples.every",
                "samples.prompts",
                "samples.own_prompts",
                "adapter.trigger",
            )
        ),
        *(f"vae.{name}" for name in ("eval_crops", "eval_every", "checkpoint_every")),
        "models.transformer.card.license",
        "models.transformer.card.base_model",
        "runtime.processes",
        "runtime.nodes",
    ],
)
def test_what_changes_no_weight_is_no_part_of_a_runs_identity(name: str) -> None:
    assert effect(name) is Effect.NONE
    assert deciding({name: 1}) == {}


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"dit_stage2.{name}"
            for name in (
                "steps",
                "global_batch_size",
                "micro_batch_size",
                "learning_rate",
                "schedule",
                "warmup_steps",
                "weight_decay",
                "max_grad_norm",
                "ema_decay",
                "precision",
                "sigma_range",
                "timestep_density",
                "timestep_shift",
                "sigma_table",
                "initial_weights",
                "guidance_scale",
                "caption_dropout",
                "adapter.rank",
            )
        ),
        *(f"vae.{name}" for name in ("crop_px", "batch_size", "loss.wavelet", "learning_rate")),
        "objective.kind",
        "objective.gamma",
        "models.transformer.rope_variant",
        "models.transformer.backbone",
        # Of a backbone whose section the schema does not know.
        "models.transformer.toy.width",
        "project.seed",
        "runtime.torch_threads",
        "runtime.device",
        "runtime.compile",
    ],
)
def test_what_can_change_a_weight_is_part_of_it(name: str) -> None:
    assert effect(name) is None
    assert deciding({name: 1}) == {name: 1}


def test_of_a_folder_of_weights_the_content_counts(root) -> None:
    values = dict(flatten(yaml.safe_load((root / "params.yaml").read_text())))
    values["models.transformer.pretrained"] = "weights/flux"
    assert naming(values) == {"models.transformer.pretrained": "weights/flux"}
    assert "models.transformer.pretrained" not in deciding(values)


def test_what_a_checkpoint_cannot_be_loaded_under() -> None:
    hard = ("dit_stage1.precision", "dit_stage1.adapter.rank", "models.transformer.tiny.num_layers")
    soft = (
        "dit_stage1.learning_rate",
        "dit_stage2.precision",
        "models.transformer.rope_variant",
        "models.transformer.rope_window",
        "models.transformer.quantisation",
    )
    assert all(shapes_state("dit_stage1", name) for name in hard)
    assert not any(shapes_state("dit_stage1", name) for name in soft)


def test_the_autoencoder_is_only_looked_through_by_the_transformers_training() -> None:
    assert only_seen("dit_stage1", "models.autoencoder.decode_mode")
    assert not only_seen("vae", "models.autoencoder.decode_mode")
    assert not only_seen("dit_stage1", "models.transformer.rope_variant")
