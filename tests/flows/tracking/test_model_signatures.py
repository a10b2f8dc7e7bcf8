"""Signatures name what the networks really take and give."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from flows.tracking.model_signatures import signature_of, tensor_shapes

FREE = {"hidden_states": 6, "encoder_hidden_states": 4, "img_ids": 6, "txt_ids": 4}


def test_a_flux_transformer_takes_and_gives_the_named_tensors(tmp_path: Path) -> None:
    from components.models.transformer import UltraFluxTransformer2DModel

    model = UltraFluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    model.save_pretrained(tmp_path)
    signature = signature_of(tmp_path)
    assert signature is not None
    taken = {spec.name: spec.shape for spec in signature.inputs.inputs}
    assert set(taken) <= set(inspect.signature(model.forward).parameters)
    tensors = {}
    for name, shape in taken.items():
        ids = name.endswith("_ids")
        # Ids have no batch; other first sizes are the batch, further free ones the tokens.
        sizes = [FREE.get(name, 1) if (at or ids) and s == -1 else s for at, s in enumerate(shape)]
        tensors[name] = torch.zeros([1 if s == -1 else s for s in sizes])
    out = model(**tensors, grid_hw=(2, 3)).sample
    (given,) = (spec.shape for spec in signature.outputs.inputs)
    assert out.shape == (1, FREE["hidden_states"], given[-1])


def test_an_autoencoder_takes_and_gives_images() -> None:
    config = {"_class_name": "AutoencoderKLF16", "in_channels": 3, "out_channels": 3}
    image = {"sample": (-1, 3, -1, -1)}
    assert tensor_shapes(config) == (image, image)


def test_sd3_takes_latents_that_are_not_packed() -> None:
    config = {
        "_class_name": "SD3Transformer2DModel",
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    }
    shapes = tensor_shapes(config)
    assert shapes is not None
    assert shapes[0]["hidden_states"] == (-1, 16, -1, -1)
    assert "img_ids" not in shapes[0]


@pytest.mark.parametrize("text", [None, '{"_class_name": "SanaTransformer"}'])
def test_an_unknown_folder_has_no_signature(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert signature_of(tmp_path) is None
