from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from components.files.safetensors_header import describe_file
from components.models.checkpoint_files import WeightsBroken
from components.models.loading.original_layout import original_layout
from components.models.loading.single_file import convert_original, load_single_file
from components.models.tiny import build_tiny_transformer
from components.settings.bad_input import BadInput
from components.training.adapters.export_choices import DELTAS_FILE, WEIGHTS_FILE
from components.training.adapters.weight_export import export_whole, stochastic_bfloat16
from components.training.sharded.hand_over import MOVEMENT_FILE, movement, write_movement
from flows.commands.model.weights import app

CARD = """---
license: apache-2.0
base_model: some/base
tags: [ultraflux, flux]
ultraflux:
  stage: dit_stage2
  weights: ema
  digests: {{initial_weights: {}, weights: {}}}
---
""".format("a" * 64, "b" * 64)
DATE = {"date": "2026-11-29"}


@pytest.fixture
def learned(tmp_path):
    """(folder, state): weights that training has moved by about a thousandth of bfloat16's grid."""
    model = build_tiny_transformer(num_layers=1, num_single_layers=1, rope_variant="paper")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    start = {name: tensor.to(torch.bfloat16).float() for name, tensor in model.state_dict().items()}
    state = {
        name: tensor + 2e-4 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in start.items()
    }
    model.load_state_dict(state)
    folder = tmp_path / "ema"
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    write_movement(folder, movement(state, start))
    return folder, state


def metadata(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_the_original_layout_goes_out_and_in_again_byte_for_byte(learned, tmp_path):
    folder, state = learned
    out = tmp_path / "uf.safetensors"
    done = export_whole(folder, out, layout="bfl", bits="float32", **DATE)
    assert (done.error, done.kept) == (0.0, 1.0)
    back = load_single_file(out, dtype=torch.float32, rope_variant="paper").state_dict()
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    names = set(load_file(out))
    assert {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.bias"} < names
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in names


def test_the_converter_of_stock_diffusers_reads_the_original_layout():
    """Its width is 3072; it cuts rows, so thin matrices of that height will do."""
    model = build_tiny_transformer(num_layers=1, num_single_layers=1)
    generator = torch.Generator().manual_seed(0)
    heights = {"proj_mlp": 4, "norm1": 6, "norm1_context": 6, "ff.net.0": 4, "ff_context.net.0": 4}
    state = {}
    for name in model.state_dict():
        times = next((n for part, n in heights.items() if part in name), 1)
        if name.startswith("single") and ".norm." in name:
            times = 3
        if name.startswith("norm_out"):
            times = 2
        shape = (3072 * times,) if name.endswith("bias") or "attn.norm" in name else None
        state[name] = torch.randn(shape or (3072 * times, 2), generator=generator)
    original = original_layout(state)
    # It takes tensors out of what it is given.
    found = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    ours = convert_original(original)
    assert all(torch.equal(ours[name], state[name]) for name in state)


def test_stock_diffusers_loads_the_folder_and_every_file_says_what_it_is(learned, tmp_path):
    folder, state = learned
    done = export_whole(
        folder,
        tmp_path / "out",
        layout="diffusers",
        bits="bfloat16",
        resolution="4096x4096",
        **DATE,
    )
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, state[name].to(torch.bfloat16))
    # Plain rounding: half a step of 8 bits at most.
    assert 0 < done.error < 2**-8
    about = metadata(tmp_path / "out" / WEIGHTS_FILE)
    assert about["modelspec.title"] == "UltraFlux dit_stage2 ema bfloat16"
    assert about["modelspec.architecture"] == "flux-1-dev"
    assert about["modelspec.resolution"] == "4096x4096"
    assert about["modelspec.date"] == "2026-11-29"
    assert about["modelspec.license"] == "apache-2.0"
    assert about["modelspec.tags"] == "ultraflux, flux"
    assert about["ultraflux.base_sha256"] == "a" * 64
    assert about["modelspec.hash_sha256"].startswith("0x")


def test_ways_of_rounding_keep_more_of_what_was_learned(learned, tmp_path):
    folder, state = learned
    plain, stochastic, deltas = (
        export_whole(
            folder, tmp_path / kind, layout="diffusers", bits="bfloat16", rounding=kind, **DATE
        )
        for kind in ("nearest", "stochastic", "deltas")
    )
    assert plain.kept is not None
    assert plain.kept < 0.9
    # Right on average; of a single weight it is not nearer.
    assert abs(stochastic.mean_error) < 1e-4
    assert stochastic.error > plain.error
    assert (deltas.kept, deltas.error) == (1.0, 0.0)
    rounded = load_file(tmp_path / "deltas" / WEIGHTS_FILE)
    rest = load_file(tmp_path / "deltas" / DELTAS_FILE)
    assert all(torch.equal(rounded[n].float() + rest[n], state[n]) for n in state)


def test_an_export_below_the_share_that_is_asked_for_fails_and_writes_nothing(learned, tmp_path):
    folder, _ = learned
    words = ["export", str(folder), "--out", str(tmp_path / "x"), "--min-kept"]
    refused = CliRunner().invoke(app, [*words, "0.99"])
    assert refused.exit_code == 2
    (line,) = refused.output.splitlines()
    assert "of what training moved the weights by (at least 99.0% is asked for)" in line
    assert not (tmp_path / "x").exists()
    whole = CliRunner().invoke(app, [*words, "1", "--rounding", "deltas"])
    assert whole.exit_code == 0, whole.output
    # Weights of elsewhere, whose movement nobody knows, keep nothing that could be promised.
    (folder / MOVEMENT_FILE).unlink()
    unknown = CliRunner().invoke(app, [*words, "0.5"])
    assert unknown.exit_code == 2
    assert "keeps an unknown share" in unknown.output


def test_the_share_that_is_kept_is_the_known_one(tmp_path):
    """Weights of 1 that moved by three quarters of a step of bfloat16 come out a whole step up."""
    model = build_tiny_transformer(num_layers=1, num_single_layers=1)
    folder, step = tmp_path / "ema", 2**-7
    start = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    for quarters, printed in ((3, "66.67%"), (1, "0.00%"), (4, "100.00%")):
        state = {name: tensor + quarters / 4 * step for name, tensor in start.items()}
        model.load_state_dict(state)
        model.save_pretrained(folder)
        write_movement(folder, movement(state, start))
        words = ["export", str(folder), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert f"share of the learned movement kept: {printed}" in done.output
        done = CliRunner().invoke(app, [*words, "--rounding", "deltas"])
        assert "relative error 0, its mean 0; share of the learned movement kept: 100.00%" in (
            done.output
        )


@torch.no_grad()
def test_a_file_in_the_original_layout_keeps_the_positions_that_it_was_trained_with(
    learned, tmp_path
):
    folder, _ = learned
    config = json.loads((folder / "config.json").read_text())
    # Flux' shares of a head are others.
    assert config["axes_dims_rope"] == [8, 12, 12]
    (folder / "config.json").write_text(json.dumps(config | {"rope_window": 2}))
    out = tmp_path / "uf.safetensors"
    export_whole(folder, out, layout="bfl", bits="float32", **DATE)
    found = load_single_file(out, dtype=torch.float32).config
    assert (found.rope_variant, found.rope_window) == ("paper", 2)
    assert found.axes_dims_rope == (8, 12, 12)
    asked = load_single_file(out, dtype=torch.float32, rope_variant="flux")
    assert asked.config.rope_variant == "flux"
    # The same file again.
    again, once_more = tmp_path / "again" / "ema", tmp_path / "again.safetensors"
    load_single_file(out, dtype=torch.float32).save_pretrained(again)
    (again / "README.md").write_text(CARD)
    export_whole(again, once_more, layout="bfl", bits="float32", **DATE)
    assert once_more.read_bytes() == out.read_bytes()
    describe_file(out, {"ultraflux.rope_variant": "of nobody"})
    with pytest.raises(WeightsBroken, match="positions: of nobody"):
        load_single_file(out, dtype=torch.float32)


@pytest.mark.slow
def test_stock_diffusers_loads_the_one_file_and_it_comes_out_again(tmp_path):
    """At the width of 3,072 that its converter assumes: a block of each kind, bfloat16."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
        ).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for number, tensor in enumerate(model.state_dict().values()):
        # 251 values that bfloat16 holds, in an order of each tensor's own.
        values = torch.arange(number, number + tensor.numel(), dtype=torch.int32) % 251
        tensor.copy_(values.reshape(tensor.shape) / 256)
    folder, file = tmp_path / "stock", tmp_path / "flux.safetensors"
    model.save_pretrained(folder)
    export_whole(folder, file, layout="bfl", bits="bfloat16", **DATE)
    found = FluxTransformer2DModel.from_single_file(
        file, config=str(folder), torch_dtype=torch.bfloat16
    )
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    again, once_more = tmp_path / "again" / "stock", tmp_path / "again.safetensors"
    found.save_pretrained(again)
    del found, model, expected
    export_whole(again, once_more, layout="bfl", bits="bfloat16", **DATE)
    # Also what the folder is called stands in the title; all else is equal.
    before, after = metadata(file), metadata(once_more)
    titles = {before.pop("modelspec.title"), after.pop("modelspec.title")}
    assert len(titles) == 2
    # With the tensors' hash.
    assert before == after


def test_stochastic_rounding_takes_both_neighbours_as_often_as_is_due():
    low, high = 1.0, 1.0 + 2**-7
    weights = torch.full((100_000,), low + 0.25 * (high - low))
    found = stochastic_bfloat16(weights, seed=1).float()
    assert set(found.tolist()) == {low, high}
    assert float((found == high).float().mean()) == pytest.approx(0.25, abs=0.01)
    exact = torch.tensor([1.0, -0.5, 0.0])
    assert torch.equal(stochastic_bfloat16(exact, seed=1).float(), exact)


def test_fp8_is_of_the_blocks_matrices_and_loads_again(learned, tmp_path):
    folder, _ = learned
    out = tmp_path / "fp8.safetensors"
    done = CliRunner().invoke(
        app, ["export", str(folder), "--out", str(out), "--layout", "bfl", "--dtype", "fp8"]
    )
    assert done.exit_code == 0, done.output
    assert "share of the learned movement kept: 0.00%" in done.output
    dtypes = {name: tensor.dtype for name, tensor in load_file(out).items()}
    assert dtypes["double_blocks.0.img_mlp.0.weight"] == torch.float8_e4m3fn
    assert dtypes["img_in.weight"] == dtypes["double_blocks.0.img_mlp.0.bias"] == torch.bfloat16
    load_single_file(out, dtype=torch.float32, rope_variant="paper")


def test_nothing_is_written_over_but_an_export(learned, tmp_path):
    folder, _ = learned
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"mine")

    def typed(source, out, layout):
        words = ["export", str(source), "--out", str(out), "--layout", layout]
        return CliRunner().invoke(app, words)

    for out, layout, problem in (
        (folder, "diffusers", "would be written over"),
        (tmp_path, "diffusers", "would be written over"),
        (folder / "x.safetensors", "bfl", "would be written over"),
        (photos, "diffusers", "a folder that holds a.jpg; it would be replaced"),
        (photos, "bfl", "writes one file"),
        (tmp_path / "x.safetensors", "diffusers", "writes a folder"),
    ):
        refused = typed(folder, out, layout)
        assert refused.exit_code == 2, refused.output
        assert problem in refused.output.replace("\n", " ")
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert [one.name for one in photos.iterdir()] == ["a.jpg"]
    # An export may be made again.
    for _ in range(2):
        assert typed(folder, tmp_path / "out", "diffusers").exit_code == 0
    other = tmp_path / "vae"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused = typed(other, tmp_path / "y", "diffusers")
    assert refused.exit_code == 2
    assert str(other) in refused.output.replace("\n", "")


def test_choices_that_do_not_go_together_are_one_line(learned, tmp_path):
    folder, _ = learned
    given = {"layout": "bfl", "bits": "float32", **DATE}
    with pytest.raises(BadInput, match="of --dtype bfloat16, not float32"):
        export_whole(
            folder,
            tmp_path / "x.safetensors",
            layout="bfl",
            bits="float32",
            rounding="deltas",
            **DATE,
        )
    config = json.loads((folder / "config.json").read_text())
    del config["guidance_embeds"]
    (folder / "config.json").write_text(json.dumps(config | {"pos_embed_max_size": 8}))
    with pytest.raises(BadInput, match="only Flux"):
        export_whole(folder, tmp_path / "x.safetensors", **given)
