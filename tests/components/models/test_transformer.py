"""UltraFlux transformer: equality with stock Flux, configuration, grids, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from components.models.resonance_rope import grid_ids
from components.models.tiny import build_tiny_transformer
from components.models.transformer import UltraFluxTransformer2DModel

SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "in_channels": 16,
}


def _random_output(model: torch.nn.Module) -> None:
    """The tiny model starts at zero velocity; give it something to compare."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        model.proj_out.weight.normal_(generator=generator)


def _inputs(grid: tuple[int, int] = (5, 3)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(2, grid[0] * grid[1], 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([4.0, 1.0]),
    }


def _stock(model: UltraFluxTransformer2DModel) -> FluxTransformer2DModel:
    config = {
        name: model.config[name] for name in model.config if not name.startswith(("rope_", "_"))
    }
    stock = FluxTransformer2DModel(**config)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


@torch.no_grad()
def test_flux_variant_and_images_inside_the_window_equal_stock_flux() -> None:
    for settings in ({"rope_variant": "flux", "rope_window": 2}, {"rope_variant": "official"}):
        model = build_tiny_transformer(**SHAPE, **settings)
        _random_output(model)
        ids = {"img_ids": grid_ids(5, 3), "txt_ids": torch.zeros(7, 3)}
        expected = _stock(model)(**_inputs(), **ids).sample
        assert torch.equal(model(**_inputs(), **ids).sample, expected)
        assert expected.std() > 0


@torch.no_grad()
def test_explicit_grid_ids_and_context_give_the_same_output() -> None:
    model = build_tiny_transformer(**SHAPE, rope_window=2)
    _random_output(model)
    explicit = model(**_inputs(), grid_hw=(5, 3)).sample
    assert torch.equal(model(**_inputs(), img_ids=grid_ids(5, 3)).sample, explicit)
    with model.grid_context(5, 3):
        assert torch.equal(model(**_inputs(), return_dict=False)[0], explicit)
    assert not torch.allclose(model(**_inputs(), grid_hw=(3, 5)).sample, explicit)


@torch.no_grad()
def test_contexts_nest_and_an_error_leaves_the_outer_one() -> None:
    model = build_tiny_transformer(**SHAPE, rope_window=2)
    _random_output(model)
    outer, inner = (model(**_inputs(), grid_hw=grid).sample for grid in ((5, 3), (3, 5)))
    with model.grid_context(5, 3):
        with model.grid_context(3, 5):
            assert torch.equal(model(**_inputs()).sample, inner)
        assert torch.equal(model(**_inputs()).sample, outer)
        with pytest.raises(ValueError, match="11 positions for 15"), model.grid_context(3, 5):
            model(**_inputs(), img_ids=grid_ids(3, 5)[:11])
        assert torch.equal(model(**_inputs()).sample, outer)
    with pytest.raises(ValueError, match="grid_hw"):
        model(**_inputs())


@torch.no_grad()
def test_rope_settings_survive_saving_and_loading(tmp_path: Path) -> None:
    model = build_tiny_transformer(**SHAPE, rope_variant="paper", rope_window=3)
    _random_output(model)
    model.save_pretrained(tmp_path)
    loaded = UltraFluxTransformer2DModel.from_pretrained(tmp_path)
    assert (loaded.config.rope_variant, loaded.config.rope_window) == ("paper", 3)
    expected = model(**_inputs(), grid_hw=(5, 3)).sample
    assert torch.equal(loaded(**_inputs(), grid_hw=(5, 3)).sample, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_stock_flux_folder_loads_and_takes_rope_settings(tmp_path: Path) -> None:
    stock = _stock(build_tiny_transformer(**SHAPE))
    stock.save_pretrained(tmp_path)
    loaded = UltraFluxTransformer2DModel.from_pretrained(tmp_path, rope_window=32)
    assert (loaded.config.rope_variant, loaded.config.rope_window) == ("official", 32)
    for name, value in stock.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_another_class_in_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel"):
        UltraFluxTransformer2DModel.from_pretrained(tmp_path)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = build_tiny_transformer(**SHAPE, rope_window=2).train()
    _random_output(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**_inputs(), grid_hw=(5, 3)).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@torch.no_grad()
def test_bfloat16_models_keep_float32_positions() -> None:
    model = build_tiny_transformer(**SHAPE).to(torch.bfloat16)
    inputs = {name: value.bfloat16() for name, value in _inputs().items()}
    assert model(**inputs, grid_hw=(5, 3)).sample.dtype == torch.bfloat16
    cos, sin = model.pos_embed(grid_ids(5, 3))
    assert cos.dtype == sin.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "longest"), [(torch.bfloat16, 257), (torch.float16, 2049)])
def test_ids_of_a_dtype_are_taken_as_far_as_it_counts(dtype: torch.dtype, longest: int) -> None:
    model = build_tiny_transformer(**SHAPE)
    model(**_inputs((1, longest)), img_ids=grid_ids(1, longest).to(dtype))
    assert torch.equal(grid_ids(1, longest).to(dtype).float(), grid_ids(1, longest))
    # The next one is rounded to its neighbour.
    beyond = (1, longest + 1)
    with pytest.raises(ValueError, match=f"is exact only to {longest - 1}, the grid is 1x"):
        model(**_inputs(beyond), img_ids=grid_ids(*beyond).to(dtype), grid_hw=beyond)


def test_ids_that_cannot_be_right_are_refused() -> None:
    model = build_tiny_transformer(**SHAPE)
    with pytest.raises(ValueError, match="grid_hw"):
        model(**_inputs())
    with pytest.raises(ValueError, match="12 positions for 15"):
        model(**_inputs(), img_ids=grid_ids(4, 3))
    long = _inputs((300, 1))
    with pytest.raises(ValueError, match="float32"):
        model(**long, img_ids=grid_ids(300, 1).bfloat16())
    with pytest.raises(ValueError, match="axes_dims_rope"):
        UltraFluxTransformer2DModel(attention_head_dim=32)
