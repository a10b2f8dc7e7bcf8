"""Released layouts, built from tiny models in the true architecture, loaded by the real code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_card
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.files.weight_folders import ComponentsMissing, WeightsMissing
from components.models.checkpoint_files import WeightsBroken
from components.models.loading.flux_transformer import load_transformer
from components.models.loading.released import (
    find_sources,
    load_autoencoder,
    load_pipeline,
    source_digests,
)
from components.models.loading.single_file import convert_original, load_single_file
from components.models.pipeline import UltraFluxPipeline
from components.models.text_encoders import build_tiny_text_encoders
from components.models.transformer import UltraFluxTransformer2DModel

PROMPT = "A frozen lake under pale morning light."
AXES = (4, 14, 14)


def stock_transformer(seed: int) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )


def original_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of the conversion, written from the original model's module names."""
    out: dict[str, Tensor] = {}
    heads = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
    }
    for name, module in heads.items():
        for kind in ("weight", "bias"):
            out[f"{module}.{kind}"] = state[f"{name}.{kind}"]
    for kind in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
        for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
            for index, layer in ((1, "in_layer"), (2, "out_layer")):
                source = f"time_text_embed.{ours}_embedder.linear_{index}.{kind}"
                out[f"{theirs}_in.{layer}.{kind}"] = state[source]
        for i in range(2):
            block, target = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            for stream, norm, qkv, ff, proj in (
                ("img", "norm1", ("to_q", "to_k", "to_v"), "ff", "to_out.0"),
                (
                    "txt",
                    "norm1_context",
                    ("add_q_proj", "add_k_proj", "add_v_proj"),
                    "ff_context",
                    "to_add_out",
                ),
            ):
                out[f"{target}{stream}_mod.lin.{kind}"] = state[f"{block}{norm}.linear.{kind}"]
                joined = [state[f"{block}attn.{name}.{kind}"] for name in qkv]
                out[f"{target}{stream}_attn.qkv.{kind}"] = torch.cat(joined)
                out[f"{target}{stream}_attn.proj.{kind}"] = state[f"{block}attn.{proj}.{kind}"]
                out[f"{target}{stream}_mlp.0.{kind}"] = state[f"{block}{ff}.net.0.proj.{kind}"]
                out[f"{target}{stream}_mlp.2.{kind}"] = state[f"{block}{ff}.net.2.{kind}"]
        for i in range(3):
            block, target = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{target}linear1.{kind}"] = torch.cat([state[f"{block}{n}.{kind}"] for n in names])
            out[f"{target}linear2.{kind}"] = state[f"{block}proj_out.{kind}"]
            out[f"{target}modulation.lin.{kind}"] = state[f"{block}norm.linear.{kind}"]
    for which in ("query", "key"):
        short = which[0]
        for i in range(2):
            block, target = f"transformer_blocks.{i}.attn.", f"double_blocks.{i}."
            out[f"{target}img_attn.norm.{which}_norm.scale"] = state[f"{block}norm_{short}.weight"]
            added = state[f"{block}norm_added_{short}.weight"]
            out[f"{target}txt_attn.norm.{which}_norm.scale"] = added
        for i in range(3):
            source = f"single_transformer_blocks.{i}.attn.norm_{short}.weight"
            out[f"single_blocks.{i}.norm.{which}_norm.scale"] = state[source]
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/: FLUX.1-dev (everything), UltraFlux-v1 (two parts), v1.1, single files."""
    root = tmp_path_factory.mktemp("weights")
    flux = root / "FLUX.1-dev"
    build_tiny_text_encoders(flux, [PROMPT, "Red leaves."], t5_dim=32, clip_dim=32)
    stock_transformer(1).save_pretrained(flux / "transformer")
    tiny_card.write_stock_autoencoder(flux / "vae")
    (flux / "scheduler").mkdir()
    (flux / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny_card.SCHEDULER))
    v1 = root / "UltraFlux-v1"
    stock_transformer(2).save_pretrained(v1 / "transformer", max_shard_size="100KB")
    tiny_card.write_stock_autoencoder(v1 / "vae")
    stock_transformer(3).save_pretrained(root / "UltraFlux-v1-1-Transformer")
    state = stock_transformer(4).state_dict()
    save_file(original_layout(state), root / "flux1-dev.safetensors")
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in original_layout(state).items()},
        root / "collection.safetensors",
    )
    save_file(state, root / "diffusers-layout.safetensors")
    return root


def weights_of(model: torch.nn.Module, seed: int) -> bool:
    expected = stock_transformer(seed).state_dict()
    found = model.state_dict()
    return expected.keys() == found.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def paint(pipeline: UltraFluxPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT,
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    assert torch.isfinite(images).all()
    return images


def load(weights: Path, model: str, **kwargs: object) -> UltraFluxPipeline:
    sources = find_sources(weights / model, base=weights / "FLUX.1-dev", **kwargs)  # type: ignore[arg-type]
    return load_pipeline(sources, dtype=torch.float32)


def test_the_v1_repository_takes_its_text_parts_from_a_flux_folder(weights: Path) -> None:
    index = weights / "UltraFlux-v1/transformer/diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    pipeline = load(weights, "UltraFlux-v1")
    assert weights_of(pipeline.transformer, 2)
    assert pipeline.transformer.config.rope_variant == "official"
    assert pipeline.vae_scale_factor == 16
    assert pipeline.vae.config.decode_mode == "official_partitioned"
    assert pipeline.scheduler.config.shift == 3.0
    assert not pipeline.scheduler.config.use_dynamic_shifting
    assert paint(pipeline).shape == (1, 3, 64, 96)


def test_the_v1_1_transformer_replaces_the_transformer(weights: Path) -> None:
    replacement = weights / "UltraFlux-v1-1-Transformer"
    pipeline = load(weights, "UltraFlux-v1", transformer=replacement)
    assert weights_of(pipeline.transformer, 3)
    # Alone it takes everything else from the base folder.
    sources = find_sources(replacement, base=weights / "FLUX.1-dev")
    assert (sources.transformer, sources.autoencoder.parent.name) == (replacement, "FLUX.1-dev")


def test_a_whole_flux_folder_loads_with_stride_two_and_its_own_schedule(weights: Path) -> None:
    sources = find_sources(weights / "FLUX.1-dev")
    pipeline = load_pipeline(
        sources, dtype=torch.float32, schedule="dynamic", rope_variant="flux", stride=1
    )
    assert pipeline.vae_scale_factor == 8
    assert pipeline.scheduler.config.use_dynamic_shifting
    assert pipeline.transformer.config.rope_variant == "flux"
    assert load(weights, "FLUX.1-dev").vae_scale_factor == 16
    stock = AutoencoderKL.from_pretrained(weights / "FLUX.1-dev" / "vae")
    expected = stock.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in pipeline.vae.state_dict().items())


@pytest.mark.parametrize(
    "name", ["flux1-dev.safetensors", "collection.safetensors", "diffusers-layout.safetensors"]
)
def test_a_single_file_of_either_layout_gives_the_same_model(weights: Path, name: str) -> None:
    pipeline = load(weights, name)
    assert weights_of(pipeline.transformer, 4)
    config = stock_transformer(4).config
    for key in ("num_layers", "num_single_layers", "guidance_embeds", "axes_dims_rope"):
        assert pipeline.transformer.config[key] == config[key]
    paint(pipeline)


def test_conversion_equals_the_libraries_own_at_its_width() -> None:
    # The library splits single blocks at width 3072; no other size matters to it.
    small = original_layout(stock_transformer(5).state_dict())
    state = {name: tensor for name, tensor in small.items() if "linear1" not in name}
    torch.manual_seed(0)
    for i in range(3):
        state[f"single_blocks.{i}.linear1.weight"] = torch.randn(7 * 3072, 3)
        state[f"single_blocks.{i}.linear1.bias"] = torch.randn(7 * 3072)
    state["img_in.bias"] = torch.randn(3072)
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    found = convert_original(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_saved_pipeline_loads_as_it_was(weights: Path, tmp_path: Path) -> None:
    pipeline = load(weights, "UltraFlux-v1")
    pipeline.vae.register_to_config(decode_mode="aligned")
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(find_sources(tmp_path), dtype=torch.float32)
    assert again.vae.config.decode_mode == "aligned"
    assert isinstance(again.transformer, UltraFluxTransformer2DModel)
    # Loaded weights are aligned differently in memory, which may change the last bits of sums.
    torch.testing.assert_close(
        load_autoencoder(tmp_path / "vae", dtype=torch.float32).state_dict(),
        pipeline.vae.state_dict(),
        rtol=0,
        atol=0,
    )


def test_everything_that_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    model, base = tmp_path / "UltraFlux-v1", tmp_path / "FLUX.1-dev"
    with pytest.raises(ComponentsMissing) as raised:
        find_sources(model, base=base)
    lines = str(raised.value).splitlines()
    assert [part.name for part in raised.value.missing] == [
        *("transformer", "autoencoder (vae)"),
        *("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    ]
    assert lines[0].endswith(
        f"hf download Owen777/UltraFlux-v1 --include 'transformer/*' --local-dir {model}"
    )
    assert lines[-1].endswith(
        f"hf download black-forest-labs/FLUX.1-dev --include 'text_encoder_2/*' --local-dir {base}"
    )
    with pytest.raises(ComponentsMissing) as raised:
        find_sources(model, base=base, transformer=tmp_path / "v11")
    assert "hf download Owen777/UltraFlux-v1-1-Transformer --local-dir" in str(raised.value)


def test_a_missing_shard_and_a_shard_without_its_tensors_are_named(
    weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(weights / "UltraFlux-v1" / "transformer", folder)
    shards = sorted(folder.glob("*-of-*.safetensors"))
    lost = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(WeightsMissing, match=shards[1].name):
        load_transformer(folder, dtype=torch.float32)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(WeightsBroken, match=r"the index expects .*; download it again"):
        load_transformer(folder, dtype=torch.float32)
    shards[1].write_bytes(lost)
    assert weights_of(load_transformer(folder, dtype=torch.float32), 2)


def test_wrong_keys_and_shapes_are_named_before_anything_is_loaded(
    weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(weights / "FLUX.1-dev" / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["x_embedder.bias"] = torch.zeros(3)
    state["stranger"] = state.pop("proj_out.bias")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(WeightsBroken) as raised:
        load_transformer(folder, dtype=torch.float32)
    message = str(raised.value)
    assert "1 tensors are missing (proj_out.bias)" in message
    assert "1 tensors are unknown (stranger)" in message
    assert "x_embedder.bias is (3,), the configuration needs (64,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files_are_one_clear_line(weights: Path, tmp_path: Path, damage: str) -> None:
    data = (weights / "flux1-dev.safetensors").read_bytes()
    broken = {"cut": data[: len(data) // 2], "garbage": b"not tensors" * 99, "empty": b""}[damage]
    file = tmp_path / "flux.safetensors"
    file.write_bytes(broken)
    with pytest.raises(WeightsBroken, match="not a readable safetensors file") as raised:
        load_single_file(file, dtype=torch.float32, rope_variant="official")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "name it .gguf"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(64), "can run code: get the .safetensors file"),
    ],
)
def test_a_file_under_a_wrong_name_is_told_by_its_first_bytes(
    tmp_path: Path, start: bytes, remedy: str
) -> None:
    file = tmp_path / "flux.safetensors"
    file.write_bytes(start)
    with pytest.raises(WeightsBroken, match=remedy):
        load_single_file(file, dtype=torch.float32)


def test_pickled_and_foreign_files_are_refused(weights: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "flux.ckpt"
    torch.save({}, pickled)
    with pytest.raises(WeightsBroken, match="pickled weights can run code"):
        find_sources(pickled, base=weights / "FLUX.1-dev")
    with pytest.raises(WeightsBroken, match="pickled weights can run code"):
        load_single_file(pickled, dtype=torch.float32, rope_variant="official")
    other = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.strange.weight": torch.zeros(2)}, other)
    with pytest.raises(WeightsBroken, match=r"other\.safetensors: double_blocks\.0\.strange"):
        load_single_file(other, dtype=torch.float32, rope_variant="official")


FUSED = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64)}, "an adapter"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 64)}, "an adapter"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (4, 64)}, "an adapter"),
        ({f"{FUSED}.lokr_w1": (4, 4)}, "an adapter"),
        ({f"{FUSED}.weight.absmax": (4,)}, "packed by another program; take the bfloat16"),
        ({f"{FUSED}.scale_weight": ()}, "only fp8 with one scale for a matrix"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4)}, "not a Flux transformer"),
    ],
)
def test_what_is_no_whole_flux_transformer_is_called_what_it_is(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], problem: str
) -> None:
    file = tmp_path / "downloaded.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(WeightsBroken, match=problem) as raised:
        load_single_file(file, dtype=torch.float32)
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)


def test_a_transformer_without_blocks_or_of_whole_numbers_is_refused(
    weights: Path, tmp_path: Path
) -> None:
    state = load_file(weights / "flux1-dev.safetensors")
    file = tmp_path / "part.safetensors"
    parts = {
        "no tensor of transformer_blocks": {
            name: one for name, one in state.items() if not name.startswith("double_blocks.")
        },
        "no tensor of single_transformer_blocks": {
            name: one for name, one in state.items() if not name.startswith("single_blocks.")
        },
        "img_in.weight: int32; weights are": state
        | {"img_in.weight": state["img_in.weight"].to(torch.int32)},
        "img_in.weight: complex64; weights are": state
        | {"img_in.weight": state["img_in.weight"].to(torch.complex64)},
    }
    for problem, tensors in parts.items():
        save_file(tensors, file)
        with pytest.raises(WeightsBroken, match=problem):
            load_single_file(file, dtype=torch.float32)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_its_values_times_their_scale(
    weights: Path, tmp_path: Path, scale: str
) -> None:
    state = load_file(weights / "flux1-dev.safetensors")
    expected, stored = {}, {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim == 2 and "blocks." in name:
            layer = name.removesuffix(".weight")
            stored[name] = (tensor * 8).to(torch.float8_e4m3fn)
            stored[f"{layer}.{scale}"] = torch.tensor(0.125)
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
            expected[name] = stored[name].float() / 8
        else:
            stored[name] = expected[name] = tensor
    file = tmp_path / "scaled.safetensors"
    save_file(stored, file)
    found = load_single_file(file, dtype=torch.float32).state_dict()
    wanted = convert_original(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_folders_of_something_else_are_called_what_they_are(weights: Path, tmp_path: Path) -> None:
    base, other = weights / "FLUX.1-dev", tmp_path / "other"
    other.mkdir()

    def refused(problem: str, model: Path = other) -> None:
        with pytest.raises(WeightsBroken, match=problem) as raised:
            find_sources(model, base=base)
        assert "\n" not in str(raised.value)
        assert "hf download" not in str(raised.value)

    refused("holds AutoencoderKL", base / "vae")
    shutil.copy(weights / "flux1-dev.safetensors", other / "flux.safetensors")
    refused(f"give a file, such as {other / 'flux.safetensors'}")
    shutil.copy(other / "flux.safetensors", other / "pytorch_lora_weights.safetensors")
    refused("holds an adapter")
    (other / "pytorch_lora_weights.safetensors").unlink()
    (other / "unet").mkdir()
    (other / "unet" / "config.json").write_text("{}")
    refused("no transformer/ beside unet: not Flux")
    shutil.copy(weights / "flux1-dev.safetensors", tmp_path / "flux")
    refused("neither .safetensors nor .gguf", tmp_path / "flux")


def test_damaged_text_encoders_are_named(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / "FLUX.1-dev", tmp_path / "flux")
    file = tmp_path / "flux" / "text_encoder_2" / "model.safetensors"
    state = load_file(file)
    name = next(key for key in state if "wi_0" in key)
    del state[name]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(WeightsBroken, match=r"text_encoder_2: 1 missing_keys"):
        load_pipeline(find_sources(tmp_path / "flux"), dtype=torch.float32)
    file.write_bytes(b"x" * 64)
    with pytest.raises(WeightsBroken, match=r"model\.safetensors: not a readable"):
        load_pipeline(find_sources(tmp_path / "flux"), dtype=torch.float32)


def test_digests_follow_content_not_place(weights: Path, tmp_path: Path) -> None:
    first = source_digests(find_sources(weights / "FLUX.1-dev"))
    shutil.copytree(weights / "FLUX.1-dev", tmp_path / "copy")
    assert source_digests(find_sources(tmp_path / "copy")) == first
    single = find_sources(weights / "flux1-dev.safetensors", base=weights / "FLUX.1-dev")
    assert source_digests(single)["transformer"] != first["transformer"]
    assert source_digests(single)["text_encoders"] == first["text_encoders"]
    # A folder's scheduler decides pictures of the dynamic schedule alone.
    config = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_shift": 2.5}))
    copy = find_sources(tmp_path / "copy")
    assert source_digests(copy) == first
    assert source_digests(copy, "dynamic") != source_digests(
        find_sources(weights / "FLUX.1-dev"), "dynamic"
    )
