"""Adapter files: what stock diffusers reads from them, and what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from components.settings.bad_input import BadInput
from components.training.adapters.adapter_files import (
    BACKBONE,
    BASE_SHA256,
    BASE_TITLE,
    MISSING,
    RANK,
    STAGES,
    Adapter,
    read_adapter,
    write_adapter,
)
from components.training.adapters.flux_names import original_names
from components.training.adapters.low_rank import LowRank
from flows.cli import app

ABOUT = {
    BACKBONE: "flux",
    BASE_TITLE: "some/base",
    BASE_SHA256: "a" * 64,
    MISSING: "0",
    STAGES: "dit_stage1+dit_stage2",
    "modelspec.title": "UltraFlux dit_stage2 ema",
    "modelspec.license": "other",
    "modelspec.trigger_phrase": "in the manner of ünïcode",
}
WIDTH = 24
BLOCK = "transformer_blocks.1"
LAYERS = {
    f"{BLOCK}.attn.to_q": (WIDTH, WIDTH, 3),
    f"{BLOCK}.attn.to_v": (WIDTH, WIDTH, 3),
    f"{BLOCK}.attn.add_k_proj": (WIDTH, WIDTH, 2),
    f"{BLOCK}.attn.to_out.0": (WIDTH, WIDTH, 4),
    f"{BLOCK}.attn.to_add_out": (WIDTH, WIDTH, 2),
    f"{BLOCK}.ff.net.0.proj": (4 * WIDTH, WIDTH, 2),
    f"{BLOCK}.ff.net.2": (WIDTH, 4 * WIDTH, 2),
    f"{BLOCK}.ff_context.net.0.proj": (4 * WIDTH, WIDTH, 2),
    f"{BLOCK}.norm1.linear": (6 * WIDTH, WIDTH, 1),
    f"{BLOCK}.norm1_context.linear": (6 * WIDTH, WIDTH, 1),
    "single_transformer_blocks.0.proj_out": (WIDTH, 5 * WIDTH, 2),
    "single_transformer_blocks.0.norm.linear": (3 * WIDTH, WIDTH, 2),
    "norm_out.linear": (2 * WIDTH, WIDTH, 2),
    "proj_out": (16, WIDTH, 2),
    "x_embedder": (WIDTH, 16, 2),
    "context_embedder": (WIDTH, 32, 2),
}


def random_adapter(layers: dict[str, tuple[int, int, int]]) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    change = {
        name: LowRank(
            torch.randn(rank, width, generator=generator),
            torch.randn(height, rank, generator=generator),
        )
        for name, (height, width, rank) in layers.items()
    }
    return Adapter(change, ABOUT)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_file_comes_back_whole_and_says_what_it_is(tmp_path: Path) -> None:
    adapter, path = random_adapter(LAYERS), tmp_path / "a.safetensors"
    write_adapter(adapter, path)
    back = read_adapter(path)
    assert set(back.change) == set(adapter.change)
    for name, one in back.change.items():
        assert torch.equal(one.matrix(), adapter.change[name].matrix())
    about = metadata(path)
    assert about.items() >= ABOUT.items()
    assert about["modelspec.architecture"] == "flux-1-dev/lora"
    assert about["modelspec.sai_model_spec"] == "1.0.1"
    assert about["ultraflux.rank"] == "4"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert about["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data[start:]).hexdigest()}"
    # In order, where the library's own order differs from process to process.
    header = json.loads(data[8:start])
    assert list(header["__metadata__"]) == sorted(about)


def test_equal_adapters_are_equal_files_in_every_process(tmp_path: Path) -> None:
    write_adapter(random_adapter(LAYERS), tmp_path / "here.safetensors")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from components.training.adapters.adapter_files import read_adapter, write_adapter\n"
        "write_adapter(read_adapter(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    other = tmp_path / "other.safetensors"
    command = [sys.executable, "-c", script, str(tmp_path / "here.safetensors"), str(other)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[4])
    assert other.read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_the_names_of_comfyui_are_read_by_stock_diffusers_as_the_same_change(
    tmp_path: Path,
) -> None:
    """Its own converter of such files gives the change of every layer back."""
    adapter, path = random_adapter(LAYERS), tmp_path / "comfy.safetensors"
    write_adapter(adapter, path, "comfyui")
    tensors = load_file(path)
    assert "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight" in tensors
    assert all(name.startswith("lora_unet_") for name in tensors)
    state = FluxPipeline.lora_state_dict(tensors)
    seen = set()
    for key in state:
        if ".lora_A." not in key:
            continue
        layer = key.split(".lora_A.")[0].removeprefix("transformer.")
        matrix = state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
        if layer in adapter.change:
            expected = adapter.change[layer].matrix()
            torch.testing.assert_close(matrix, expected, rtol=1e-6, atol=1e-6)
            seen.add(layer)
        else:
            # What shares a fused layer with one that is changed.
            assert float(matrix.abs().max()) == 0.0
    assert seen == set(adapter.change)


def test_comfyuis_names_go_out_and_in_again_byte_for_byte(tmp_path: Path) -> None:
    fused = "single_transformer_blocks.0"
    parts = {f"{fused}.attn.to_v": (WIDTH, WIDTH, 2), f"{fused}.proj_mlp": (4 * WIDTH, WIDTH, 3)}
    adapter = random_adapter(LAYERS | parts)
    # Untrained: nothing but the file says how wide its share of the fused layer is.
    adapter.change[f"{fused}.attn.to_v"].up.zero_()
    own, comfy, back, again = (tmp_path / f"{n}.safetensors" for n in ("own", "comfy", "b", "a"))
    write_adapter(adapter, own)
    write_adapter(adapter, comfy, "comfyui")
    read = read_adapter(comfy)
    write_adapter(read, back)
    write_adapter(read, again, "comfyui")
    assert back.read_bytes() == own.read_bytes()
    assert again.read_bytes() == comfy.read_bytes()
    # The rank of a file is that of its own layers, of which ComfyUI's hold several.
    assert dict(read.about) | {RANK: ""} == dict(read_adapter(own).about) | {RANK: ""}
    tensors, about = load_file(comfy), metadata(comfy)
    del tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"]
    save_file(tensors, comfy, about)
    with pytest.raises(BadInput, match="layer lora_unet_single_blocks_0_linear1 is missing"):
        read_adapter(comfy)


def test_a_single_blocks_fused_layer_holds_its_parts_in_their_rows() -> None:
    layers = {
        "single_transformer_blocks.7.attn.to_k": (WIDTH, WIDTH, 2),
        "single_transformer_blocks.7.proj_mlp": (4 * WIDTH, WIDTH, 3),
    }
    adapter = random_adapter(layers)
    fused = original_names(adapter.change)["lora_unet_single_blocks_7_linear1"].matrix()
    key, mlp = (one.matrix() for one in adapter.change.values())
    zeros = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(fused, torch.cat([zeros, key, zeros, mlp]))


def test_a_layer_without_a_counterpart_is_named() -> None:
    adapter = random_adapter({"transformer_blocks.0.attn.norm_q": (8, 8, 1)})
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.norm_q has no name"):
        original_names(adapter.change)


def test_the_command_cuts_renames_and_says_what_is_lost(tmp_path: Path) -> None:
    path, out = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "out.safetensors"
    adapter = random_adapter(LAYERS)
    write_adapter(adapter, path)
    run = CliRunner().invoke
    done = run(app, ["weights", "adapter", str(tmp_path), "--out", str(out), "--rank", "1"])
    assert done.exit_code == 0, done.output
    cut = read_adapter(out)
    assert {one.rank for one in cut.change.values()} == {1}
    lost = sum(
        float((one.matrix() - cut.change[name].matrix()).square().sum())
        for name, one in adapter.change.items()
    )
    whole = sum(float(one.matrix().square().sum()) for one in adapter.change.values())
    share = (lost / whole) ** 0.5
    assert float(cut.about[MISSING]) == pytest.approx(share, rel=0.01)
    assert f"{share:.2%}"[:2] in done.output
    assert "rank 1 on some/base (aaaaaaaaaaaa)" in done.output.replace("\n", "")
    # Cut again, the shares add up to a bound.
    again = cut.cut_to(1)
    assert float(again.about[MISSING]) == pytest.approx(share, rel=0.01)
    halved = read_adapter(path).cut_to(2)
    twice = halved.cut_to(1)
    assert float(twice.about[MISSING]) > float(halved.about[MISSING]) > 0
    assert float(twice.about[MISSING]) >= share * 0.99
    comfy = tmp_path / "comfy.safetensors"
    asked = ["--out", str(comfy), "--keys", "comfyui", "--trigger", "sks"]
    done = run(app, ["weights", "adapter", str(path), *asked])
    assert done.exit_code == 0, done.output
    assert "the whole change" in done.output
    assert metadata(comfy)["modelspec.trigger_phrase"] == "sks"
    assert metadata(comfy)["modelspec.implementation"].endswith("black-forest-labs/flux")


def test_what_is_no_adapter_of_a_known_base_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adapter; it lies beside weights"):
        read_adapter(tmp_path)
    unknown = tmp_path / "unknown.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 2)}, unknown)
    with pytest.raises(BadInput, match="does not name its base"):
        read_adapter(unknown)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    done = CliRunner().invoke(
        app, ["weights", "adapter", str(broken), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code != 0
    assert "not a safetensors file" in done.output
    sd3 = Adapter(random_adapter({"proj_out": (4, 4, 1)}).change, ABOUT | {BACKBONE: "sd3"})
    with pytest.raises(ValueError, match="an adapter of sd3 has no other names"):
        write_adapter(sd3, tmp_path / "sd3.safetensors", "comfyui")
