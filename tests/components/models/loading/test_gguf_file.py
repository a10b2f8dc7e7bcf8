"""A GGUF file in the published layout: packed weights, the same network within their rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from components.models.backbones import backbone_in, backbone_of
from components.models.checkpoint_files import WeightsBroken
from components.models.loading.flux_transformer import load_transformer
from components.models.loading.original_layout import original_layout
from components.models.loading.quantisation import QuantisationUnavailable, quantise, stored_bytes
from components.models.loading.released import find_sources
from components.models.tiny import build_tiny_transformer
from components.training.adapters.base_rounding import relative_rms

Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


def network():
    # Flux' shares of a head per axis, which a file does not say.
    axes = (4, 14, 14)
    model = build_tiny_transformer(num_layers=1, num_single_layers=1, axes_dims_rope=axes, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def write(path, state, kind, prefix=""):
    """As the converters of published files do: matrices packed, vectors in float32."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if values.ndim > 1:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(prefix + name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(prefix + name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def velocity(model):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 8, 8, generator=generator)
    texts = (torch.randn(1, 8, 64, generator=generator), torch.randn(1, 64, generator=generator))
    with torch.no_grad():
        return backbone_of(model).predict(
            model, latents, torch.tensor([0.4]), *texts, guidance_scale=3.5, dtype=torch.float32
        )


@pytest.mark.parametrize(
    ("kind", "prefix", "worst"), [(Q8, "", 0.01), (Q4, "model.diffusion_model.", 0.3)]
)
def test_a_file_in_the_original_layout_loads_packed(tmp_path, kind, prefix, worst):
    model, path = network(), tmp_path / "flux.gguf"
    write(path, original_layout(model.state_dict()), kind, prefix)
    found = load_transformer(path, dtype=torch.float32)
    assert 1e-5 < relative_rms(velocity(found), velocity(model)) < worst
    # Exactly the network of the weights that gguf itself unpacks.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = parameter.detach().numpy()
            kept = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            parameter.data = torch.from_numpy(np.ascontiguousarray(kept))
    # diffusers unpacks to float16: 2e-4 a layer.
    assert relative_rms(velocity(found), velocity(model)) < 1e-3
    assert stored_bytes(found) < 0.35 * stored_bytes(model)
    assert found.config.rope_variant == "official"
    assert (
        load_transformer(path, dtype=torch.float32, rope_variant="flux").config.rope_variant
        == "flux"
    )
    with pytest.raises(QuantisationUnavailable, match="GGUF file's are rounded already"):
        quantise(found, "int8", dtype=torch.float32, device="cpu")


def test_what_is_missing_or_no_gguf_is_one_line(tmp_path):
    state = original_layout(network().state_dict())
    del state["double_blocks.0.img_attn.proj.weight"]
    write(tmp_path / "part.gguf", state, Q8)
    with pytest.raises(
        WeightsBroken, match=r"part.gguf.*transformer_blocks.0.attn.to_out.0.weight"
    ):
        load_transformer(tmp_path / "part.gguf", dtype=torch.float32)
    (tmp_path / "no.gguf").write_bytes(b"not a file of that kind")
    with pytest.raises(WeightsBroken, match=r"no.gguf: not a readable GGUF file") as raised:
        load_transformer(tmp_path / "no.gguf", dtype=torch.float32)
    assert "\n" not in str(raised.value)


def test_a_gguf_file_is_a_transformer_whose_other_parts_come_from_the_base(tmp_path):
    file, base = tmp_path / "flux.gguf", tmp_path / "base"
    file.write_bytes(b"")
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (base / name).mkdir(parents=True)
        (base / name / "config.json").write_text("{}")
    sources = find_sources(file, base=base)
    assert (sources.transformer, sources.autoencoder) == (file, base / "vae")
    assert backbone_in(file).name == "flux"
