"""Planned memory against autograd on the meta device, and against the DeepSpeed engine."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import nn

from components.planning.counted_flops import flux_call, flux_model, product_bytes, saved_bytes
from components.planning.fake_gpu import GPU, fake_gpu
from components.planning.memory import (
    TrainedTensors,
    decoder_activation_bytes,
    flux_activation_bytes,
    flux_block_bytes,
    flux_product_bytes,
    moment_bytes,
    optimizer_bytes,
    state_bytes,
)
from components.planning.model_shapes import AutoencoderShape, FluxShape, networks
from components.planning.stage_memory import stage_memory
from components.planning.transformer import Transformer
from components.settings.schema import load_settings
from components.training.distributed.optimizers import build_optimizer


@pytest.mark.parametrize(
    ("heads", "head", "grid", "text", "batch", "precision"),
    [
        (1, 16, (1, 1), 1, 1, "bf16"),
        (3, 32, (3, 2), 7, 1, "fp32"),
        (2, 16, (3, 2), 5, 2, "bf16"),
        pytest.param(3, 32, (1, 6), 9, 3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_blocks_keep_the_bytes_that_autograd_saves(heads, head, grid, text, batch, precision):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    def saved(double: int, single: int) -> tuple[int, int]:
        shape = FluxShape(
            double,
            single,
            head,
            heads,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            in_channels=8,
        )
        with fake_gpu():
            with GPU:
                model = flux_model(shape, dtype)
            call = flux_call(model, grid, text, batch)
            return saved_bytes(model, call), product_bytes(call)

    # Differences, so that what is kept outside of the blocks does not matter.
    base, two_double, two_single = saved(1, 1), saved(2, 1), saved(1, 2)
    shape = FluxShape(1, 1, head, heads)
    for number, closed_form in enumerate((flux_block_bytes, flux_product_bytes)):
        double, single = closed_form(shape, grid[0] * grid[1] + text, batch, precision)
        # Another kernel attends in float32; its log-sum-exp is padded to 32 tokens.
        error = 0 if precision == "bf16" else 0.02
        assert two_double[number] - base[number] == pytest.approx(double, rel=error, abs=0)
        assert two_single[number] - base[number] == pytest.approx(single, rel=error, abs=0)


def test_selective_checkpointing_lies_between_keeping_all_and_keeping_inputs():
    none, selective, blocks = (
        flux_activation_bytes(FluxShape(), 16384 + 512, 1, "bf16", checkpointing=policy)
        for policy in ("none", "selective", "blocks")
    )
    assert blocks < selective < none


@pytest.mark.slow
def test_the_12b_transformer_keeps_119_gb_without_checkpointing_and_10_with_it():
    shape = FluxShape()
    whole, little = (
        flux_activation_bytes(shape, 16384 + 512, 1, "bf16", checkpointing=on)
        for on in ("none", "blocks")
    )
    assert 119e9 < whole < 120e9
    assert 8e9 < little < 11e9
    with fake_gpu():
        with GPU:
            model = flux_model(shape)
        counted = saved_bytes(model, flux_call(model, (128, 128), 512))
    assert abs(whole / counted - 1) < 0.02


def test_the_decoder_estimate_is_near_what_autograd_saves():
    from components.models.autoencoder_f16 import AutoencoderKLF16

    shape = AutoencoderShape()
    with fake_gpu():
        with GPU:
            model = AutoencoderKLF16(
                **vars(shape),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
            latents = torch.empty(2, 16, 32, 32)
        counted = saved_bytes(model, lambda: model.decode(latents).sample)
    estimate = decoder_activation_bytes(shape, 512, 512, 2, checkpointing=False)
    assert abs(estimate / counted - 1) < 0.2


@pytest.mark.parametrize(
    ("zero", "precision", "processes", "expected"),
    [
        # Bytes per parameter at the end of a backward pass, measured on DeepSpeed 0.19.8.
        (1, "bf16", 1, 20.0),
        (1, "bf16", 2, 14.0),
        (2, "bf16", 1, 18.0),
        (2, "bf16", 2, 10.0),
        (0, "fp32", 1, 16.0),
        (1, "fp32", 1, 20.0),
        (2, "fp32", 1, 20.0),
    ],
)
def test_states_take_the_bytes_that_were_measured(zero, precision, processes, expected):
    trained = TrainedTensors.of([(1000,)])
    assert sum(state_bytes(1000, processes, zero, precision, trained)) / 1000 == expected


def test_a_higher_zero_stage_never_needs_more():
    trained = TrainedTensors.of([(1000, 1000)])
    for precision, processes in itertools.product(("bf16", "fp32"), (2, 8, 64)):
        sums = [sum(state_bytes(10**6, processes, zero, precision, trained)) for zero in (1, 2, 3)]
        assert sums == sorted(sums, reverse=True)


def live_bytes() -> int:
    """Storage of all tensors that Python can see; shapes on the meta device have none."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors = [tensor for tensor in tensors if not tensor.is_meta]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def tensor_bytes(state) -> int:
    """Bytes of the tensors of optimizer states; one that occurs twice counts once."""
    tensors = [x for values in state.values() for x in values.values() if torch.is_tensor(x)]
    return sum({x.data_ptr(): x.nbytes for x in tensors if x.dim()}.values())


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("backbone", ["flux", "sd3"])
def test_an_optimizer_keeps_what_is_planned_of_its_kind(profile, tmp_path, backbone, kind):
    settings = profile(
        "embedded",
        models__transformer__backbone=backbone,
        dit_stage1__optimizer=kind,
        dit_stage1__zero_stage=0,
        dit_stage1__precision="fp32",
    )
    subject = Transformer(networks(settings, tmp_path), settings)
    model = subject.model(torch.float32)
    optimizer = build_optimizer(model.parameters(), settings.dit_stage1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = tensor_bytes(optimizer.state)
    trained = subject.trained_tensors(settings.dit_stage1)
    assert trained.elements == sum(p.numel() for p in model.parameters())
    # Ranks of a whole optimizer keep all of it, however many they are.
    assert optimizer_bytes(kind, trained, 1) == held
    assert kind == "adamw" or optimizer_bytes(kind, trained, 8) == held
    assert stage_memory("dit_stage1", subject, [(256, 256)]).memory.optimizer == held


@pytest.mark.slow
@pytest.mark.usefixtures("training_environment_restored")
@pytest.mark.parametrize(
    ("optimizer", "frozen"), [("adamw", 0), ("adamw_8bit", 0), ("adamw", 6), ("adamw_8bit", 6)]
)
def test_the_engine_holds_the_planned_states(root, tmp_path, optimizer, frozen):
    from components.training.distributed.ranks import open_ranks
    from components.training.sharded.engine import initialize_engine

    stage = load_settings(root / "params.yaml").dit_stage1.model_copy(
        update={
            "precision": "bf16",
            "zero_stage": 2,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": optimizer,
        }
    )
    eight_bits = optimizer == "adamw_8bit"
    with open_ranks("cpu") as ranks:
        before = live_bytes()
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
        model[:frozen].requires_grad_(False)
        engine = initialize_engine(model, stage, ranks)
        held = sum(parameter.numel() for parameter in engine.module.parameters())
        trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        assert trained == (8 - frozen) * held // 8
        for number in range(4):
            loss = engine(torch.randn(2, 512, dtype=torch.bfloat16)).float().square().mean()
            engine.backward(loss)
            del loss
            peak = live_bytes() - before
            if number < 3:
                engine.step()
        shapes = [tuple(p.shape) for p in engine.module.parameters() if p.requires_grad]
        planned = state_bytes(held, 1, 2, "bf16", TrainedTensors.of(shapes), optimizer)
        assert abs(peak / sum(planned) - 1) < 0.01
        states = tensor_bytes(engine.optimizer.optimizer.state)
        assert states == moment_bytes(trained, eight_bits=eight_bits)
        assert planned[2] == states + 4 * trained
        engine.save_checkpoint(str(tmp_path / "saved"), tag="engine", save_latest=False)
        stored = sum(f.stat().st_size for f in (tmp_path / "saved" / "engine").iterdir())
        assert abs(stored / (2 * held + states + 4 * trained) - 1) < 0.01


def test_small_moments_are_not_kept_in_8_bits():
    assert moment_bytes(4095, eight_bits=True) == moment_bytes(4095, eight_bits=False)
    # 2 bytes a value, 2 x 4 bytes per 256 of them, 2 tables of 1 KiB.
    assert moment_bytes(4096, eight_bits=True) == 2 * 4096 + 2 * 4 * 16 + 2048
    assert moment_bytes(2**20, eight_bits=True) == 2 * 2**20 + 2**15 + 2048
