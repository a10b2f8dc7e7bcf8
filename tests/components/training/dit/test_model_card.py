"""Exported transformer folders: model card, checksums, shards, and who can load them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel

from components.files.weight_folders import weights_checksums, weights_identity
from components.models.resonance_rope import grid_ids
from components.models.sd3.transformer import build_tiny_sd3_transformer
from components.models.tiny import build_tiny_transformer
from components.models.transformer import UltraFluxTransformer2DModel
from components.settings.effects import effect
from components.settings.section import Effect
from components.settings.training import DitStageSettings
from components.training.dit.export import save_transformer
from components.training.dit.job import DitJob
from components.training.dit.model_card import (
    TrainingFacts,
    initial_identity,
    last_validation,
    model_card,
    settings_digest,
)
from components.training.dit.validation import LEVELS, ValidationLoss

GRID = (3, 5)


@pytest.fixture
def facts() -> TrainingFacts:
    def losses(value: float) -> ValidationLoss:
        return ValidationLoss((value,) * LEVELS, (value,) * LEVELS)

    return TrainingFacts(
        images=9,
        plan_digest="a" * 64,
        latents_digest="b" * 64,
        texts_digest="c" * 64,
        autoencoder_digest="d" * 64,
        text_encoder_digest="e" * 64,
        noise_levels=(0.25, 1.0),
        started_from="",
        resolution="384x256",
        validation={"start": losses(2.0), "raw": losses(1.5), "ema": losses(1.25)},
    )


@pytest.fixture
def export(
    make_dit_job: Callable[..., DitJob], facts: TrainingFacts, tmp_path: Path
) -> Callable[..., Path]:
    """Write a folder of a random transformer; returns it."""

    def write(module: object, name: str = "ema", max_shard_gb: float = 10.0) -> Path:
        job = make_dit_job(tmp_path)
        folder = tmp_path / "export" / name
        save_transformer(
            module,
            dict(module.named_parameters()),  # type: ignore[attr-defined]
            folder,
            max_shard_gb=max_shard_gb,
            card=lambda config, checksums: model_card(job, facts, "ema", config, checksums),
        )
        return folder

    return write


def front_matter(folder: Path) -> dict[str, object]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def velocity(model: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(
                2, GRID[0] * GRID[1], config.in_channels, generator=generator
            ),
            encoder_hidden_states=torch.randn(
                2, 7, config.joint_attention_dim, generator=generator
            ),
            pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([0.3, 0.9]),
            guidance=torch.full((2,), 4.0) if config.guidance_embeds else None,
            img_ids=grid_ids(*GRID),
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
        )[0]


def test_the_card_names_licence_digests_and_validation_and_holds_no_path(
    export: Callable[..., Path], tmp_path: Path
) -> None:
    folder = export(build_tiny_transformer(rope_variant="official"))
    front = front_matter(folder)
    assert front["library_name"] == "diffusers"
    assert front["license"] == "unknown"
    about = front["ultraflux"]
    assert about["validation_loss"] == 1.25
    assert about["sigma_range"] == [0.25, 1.0]
    assert about["rope_variant"] == "official"
    checksums = (folder / "weights.sha256").read_text()
    assert about["digests"]["weights"] == hashlib.sha256(checksums.encode()).hexdigest()
    assert about["digests"]["latents"] == "b" * 64
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| mean | 2.0000 | 1.2500 |" in text
    assert "beyond the window of 64" in text
    assert str(tmp_path) not in text
    done = subprocess.run(["sha256sum", "-c", "weights.sha256"], cwd=folder, check=True, text=True)
    assert done.returncode == 0


def test_the_next_stage_names_the_weights_it_started_from(export: Callable[..., Path]) -> None:
    folder = export(build_tiny_transformer())
    digests = front_matter(folder)["ultraflux"]["digests"]
    assert initial_identity(folder) == digests["weights"]
    assert digests["initial_weights"] is None
    assert initial_identity(None) == ""


def test_weights_above_the_limit_are_divided_and_load_as_the_same_tensors(
    export: Callable[..., Path],
) -> None:
    module = build_tiny_transformer(seed=3)
    whole, divided = export(module, "whole"), export(module, "divided", max_shard_gb=0.0005)
    shards = sorted(divided.glob("*.safetensors"))
    assert len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 600_000
    assert (divided / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(weights_checksums(divided).splitlines()) == len(shards)
    one = UltraFluxTransformer2DModel.from_pretrained(whole)
    two = UltraFluxTransformer2DModel.from_pretrained(divided)
    assert one.config == two.config
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert weights_identity(weights_checksums(whole)) != weights_identity(
        weights_checksums(divided)
    )


def test_stock_diffusers_gives_equal_outputs_for_an_export_with_plain_rope(
    export: Callable[..., Path],
) -> None:
    folder = export(build_tiny_transformer(rope_variant="flux"))
    assert "gives equal outputs" in (folder / "README.md").read_text()
    ours = UltraFluxTransformer2DModel.from_pretrained(folder)
    stock = FluxTransformer2DModel.from_pretrained(folder)
    assert type(stock) is FluxTransformer2DModel
    torch.testing.assert_close(velocity(stock), velocity(ours), rtol=1e-6, atol=1e-6)


def test_an_export_of_another_architecture_is_refused_by_class(export: Callable[..., Path]) -> None:
    folder = export(build_tiny_sd3_transformer())
    assert "SD3Transformer2DModel" in (folder / "README.md").read_text()
    assert "rope_variant" not in front_matter(folder)["ultraflux"]
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel"):
        UltraFluxTransformer2DModel.from_pretrained(folder)


def test_the_settings_digest_ignores_folders_and_sees_settings(
    make_dit_job: Callable[..., DitJob], tmp_path: Path
) -> None:
    digest = settings_digest(make_dit_job(tmp_path / "a"))
    assert digest == settings_digest(make_dit_job(tmp_path / "b"))
    assert digest != settings_digest(make_dit_job(tmp_path / "a", learning_rate=1e-5))


def test_the_last_validation_of_each_weights_counts_and_the_first_is_the_start() -> None:
    def rows() -> Iterator[dict[str, float]]:
        for step, value in ((0, 3.0), (2, 2.0), (4, 1.0)):
            losses = ValidationLoss((value,) * LEVELS, (value,) * LEVELS)
            yield {"step": step, **losses.metrics()}
            yield {"step": step, "loss": 0.5}
        yield {"step": 4, **ValidationLoss((0.5,) * LEVELS, (0.5,) * LEVELS).metrics("_ema")}

    found = last_validation(rows())
    assert {name: losses.mean for name, losses in found.items()} == {
        "start": 3.0,
        "raw": 1.0,
        "ema": 0.5,
    }


def test_a_setting_at_its_default_leaves_the_digest_of_settings_as_it_was(
    make_dit_job: Callable[..., DitJob], tmp_path: Path
) -> None:
    """Cards of before a setting existed keep their bytes; any other value is another digest."""
    plain = make_dit_job(tmp_path)
    adapter = {"rank": 1, "alpha": 1, "target_modules": ["to_q"]}
    defaults = {"caption_dropout": 0.0, "timestep_shift": 1.0, "sigma_table": "unshifted"}
    defaults |= {"guidance_scale": 1.0, "adapter": None}
    for changes, is_same in (
        ({}, True),
        ({"caption_dropout": 0.1}, False),
        ({"timestep_shift": "dynamic"}, False),
        ({"sigma_table": "shifted"}, False),
        ({"guidance_scale": 3.5}, False),
        ({"adapter": adapter}, False),
    ):
        job = make_dit_job(tmp_path, **defaults | changes)
        assert (settings_digest(job) == settings_digest(plain)) == is_same, changes
    named = make_dit_job(tmp_path, adapter=adapter | {"trigger": "sks"})
    assert settings_digest(named) == settings_digest(make_dit_job(tmp_path, adapter=adapter))
    stage = plain.settings.model_dump(mode="json")
    dated = {name for name in stage if not DitStageSettings.model_fields[name].is_required()}
    values = {
        "objective": plain.objective.model_dump(mode="json"),
        "seed": plain.seed,
        "stage": {
            name: value
            for name, value in stage.items()
            if name not in dated and effect(f"dit_stage1.{name}") is not Effect.NONE
        },
        "transformer": plain.transformer.model_dump(
            mode="json", exclude={"pretrained", "card", "quantisation"}
        ),
    }
    expected = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert settings_digest(plain) == expected
