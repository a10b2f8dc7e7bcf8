"""SD3's transformer: its table of positions beyond the stored size, and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from components.files.weight_folders import WeightsMissing
from components.models.checkpoint_files import WeightsBroken
from components.models.sd3.transformer import (
    build_tiny_sd3_transformer,
    check_position_table,
    extend_position_table,
    load_sd3_transformer,
)
from components.models.tiny import build_tiny_transformer


def small(**options: object) -> SD3Transformer2DModel:
    model = build_tiny_sd3_transformer(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        sample_size=8,
        pos_embed_max_size=12,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=generator)
    return model


def predict(model: SD3Transformer2DModel, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, height, width, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 16, generator=generator),
            pooled_projections=torch.randn(1, 16, generator=generator),
            timestep=torch.tensor([400.0]),
            return_dict=False,
        )[0]


def test_the_seed_decides_the_weights_and_the_first_velocity_is_zero() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (build_tiny_sd3_transformer(seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    model = build_tiny_sd3_transformer(joint_attention_dim=16, pooled_projection_dim=16)
    assert not predict(model, 8, 12).any()
    with pytest.raises(ValueError, match="multiple of 4"):
        build_tiny_sd3_transformer(num_attention_heads=1, attention_head_dim=6)


@pytest.mark.parametrize("size", [(24, 24), (8, 20), (24, 2)])
def test_a_continued_table_changes_nothing_for_images_that_fitted_before(
    size: tuple[int, int],
) -> None:
    model = small()
    before = predict(model, *size)
    extend_position_table(model, 18)
    assert torch.equal(predict(model, *size), before)
    assert model.config.pos_embed_max_size == 18


def test_a_continued_table_has_the_spacing_of_the_stored_one() -> None:
    """Position p in steps of base/max = 4/12: column channels are sin(p w), cos(p w), w = 1 ..."""
    model = small()
    extend_position_table(model, 16)
    table = model.pos_embed.pos_embed.reshape(16, 16, 16)
    positions = (torch.arange(16, dtype=torch.float64) - 2) / 3
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(table[5, :, :8].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(table[:, 5, 8:].double(), expected, atol=1e-6, rtol=0)


def test_images_beyond_the_table_are_refused_with_the_size_that_would_do() -> None:
    model = small()
    check_position_table(model, 24, 8)
    with pytest.raises(ValueError, match=r"26x8 need 13 patches .* has 12; .*: 14 or more"):
        check_position_table(model, 26, 8)
    with pytest.raises(ValueError, match="even number, such as 14"):
        extend_position_table(model, 13)
    extend_position_table(model, 12)
    assert model.config.pos_embed_max_size == 12
    with torch.no_grad():
        model.pos_embed.pos_embed += 0.1
    with pytest.raises(ValueError, match="not the sine-cosine table"):
        extend_position_table(model, 14)


def test_4096_px_fit_the_table_of_sd3_2b_and_the_widest_buckets_do_not() -> None:
    class Stock:
        class config:
            patch_size, pos_embed_max_size = 2, 192

    check_position_table(Stock, 4096 // 16, 4096 // 16)
    check_position_table(Stock, 2496 // 16, 5952 // 16)
    with pytest.raises(ValueError, match=r"need 198 patches .*pos_embed_max_size: 198"):
        check_position_table(Stock, 2624 // 16, 6336 // 16)


def test_an_extended_model_is_loaded_by_stock_diffusers(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "stock")
    loaded = load_sd3_transformer(tmp_path / "stock", dtype=torch.float32, pos_embed_max_size=16)
    assert torch.equal(predict(loaded, 8, 8), predict(model, 8, 8))
    loaded.save_pretrained(tmp_path / "extended")
    assert str(tmp_path) not in (tmp_path / "extended" / "config.json").read_text()
    stock = SD3Transformer2DModel.from_pretrained(tmp_path / "extended", local_files_only=True)
    assert torch.equal(predict(stock, 32, 6), predict(loaded, 32, 6))


def test_folders_that_are_not_this_transformer_are_refused(tmp_path: Path) -> None:
    build_tiny_transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match="UltraFluxTransformer2DModel, expected SD3Transformer"):
        load_sd3_transformer(tmp_path / "flux", dtype=torch.float32)
    with pytest.raises(WeightsMissing):
        load_sd3_transformer(tmp_path / "nowhere", dtype=torch.float32)
    small().save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    with pytest.raises(WeightsBroken, match="missing"):
        load_sd3_transformer(tmp_path / "other", dtype=torch.float32)
