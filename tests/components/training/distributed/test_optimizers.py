"""Every setting reaches the optimizer; where its states live changes nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from components.telemetry.metric_log import MetricLog
from components.training.distributed.optimizers import (
    apply_settings,
    build_optimizer,
    described_optimizer,
)
from components.training.distributed.ranks import open_ranks
from components.training.dit.worker import run_job
from components.training.sharded.engine import initialize_engine

pytestmark = pytest.mark.usefixtures("training_environment_restored")


ADAM = {
    "learning_rate": 0.01,
    "betas": (0.6, 0.8),
    "eps": 0.3,
    "weight_decay": 0.4,
    "decayed_weights": "matrices",
}
"""No value is a default, and each is large enough to show in float32."""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False))


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def adamw_by_hand(
    weights: torch.Tensor, gradients: list[torch.Tensor], decay: float
) -> torch.Tensor:
    """Loshchilov and Hutter, 1711.05101, algorithm 2, in float64 with the constants of `ADAM`."""
    (first, second), eps, rate = ADAM["betas"], ADAM["eps"], ADAM["learning_rate"]
    w, m, v = weights.double(), torch.zeros(()), torch.zeros(())
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m = first * m + (1 - first) * g
        v = second * v + (1 - second) * g * g
        root = (v / (1 - second**step)).sqrt() + eps
        w = w - rate * (m / (1 - first**step) / root + decay * w)
    return w


@pytest.mark.parametrize("spared", [True, False])
def test_adamw_is_the_published_formula_with_every_constant_of_the_settings(
    make_dit_job, tmp_path, spared
):
    changes = ADAM | {"decayed_weights": "matrices" if spared else "all"}
    settings = make_dit_job(tmp_path, **changes).settings
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    stepped(model, build_optimizer(model.parameters(), settings), range(3))
    for number, (old, new) in enumerate(zip(before, model.parameters(), strict=True)):
        given = [gradients(model, step)[number] for step in range(3)]
        decay = 0.0 if spared and old.dim() < 2 else ADAM["weight_decay"]
        expected = adamw_by_hand(old, given, decay).float()
        torch.testing.assert_close(new.detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_engine_holds_every_setting_and_gets_it_back_after_a_load(
    make_dit_job, tmp_path, zero_stage
):
    precision = "bf16" if zero_stage else "fp32"
    changes = ADAM | {"zero_stage": zero_stage, "precision": precision}
    settings = make_dit_job(tmp_path, **changes).settings
    with open_ranks("cpu") as ranks:
        optimizer = initialize_engine(small_model(), settings, ranks).optimizer
        for other in (False, True):
            if other:
                # As a state of other settings leaves it.
                for group in optimizer.param_groups:
                    group.update(betas=(0.1, 0.2), eps=1.0, weight_decay=9.0)
                apply_settings(optimizer, settings)
            held = [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups]
            assert held == [((0.6, 0.8), 0.3, 0.4), ((0.6, 0.8), 0.3, 0.0)]


def test_adafactor_decays_what_it_is_told(make_dit_job, tmp_path):
    """With gradients of zero nothing but the decay moves a weight: w' = w (1 - rate * decay)."""
    settings = make_dit_job(
        tmp_path, **ADAM, optimizer="adafactor", zero_stage=0, precision="fp32"
    ).settings
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model.parameters(), settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rate, decay = ADAM["learning_rate"], ADAM["weight_decay"]
    for old, new in zip(before, model.parameters(), strict=True):
        kept = 1 - rate * decay if old.dim() >= 2 else 1.0
        torch.testing.assert_close(new.detach(), kept * old, rtol=1e-6, atol=1e-8)
    states = [tuple(optimizer.state[p]) for p in model.parameters()]
    # Factored where there is a matrix to factor.
    assert states[0] == ("step", "row_var", "col_var")
    assert states[1] == ("step", "variance")


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right


def test_muon_moves_matrices_by_orthogonal_steps_and_all_else_as_adamw(make_dit_job, tmp_path):
    momentum = 0.6
    settings = make_dit_job(
        tmp_path,
        **ADAM,
        optimizer="muon",
        muon_momentum=momentum,
        zero_stage=0,
        precision="fp32",
    ).settings
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model.parameters(), settings)
    stepped(model, optimizer, range(2))
    rate, decay = ADAM["learning_rate"], ADAM["weight_decay"]
    for number, (old, new) in enumerate(zip(before, model.parameters(), strict=True)):
        given = [gradients(model, step)[number].double() for step in range(2)]
        if old.dim() < 2:
            torch.testing.assert_close(new.detach(), adamw_by_hand(old, given, 0.0).float())
            continue
        w, buffer = old.double(), torch.zeros(())
        for g in given:
            # Nesterov's momentum as torch.lerp has it, then an update of root mean square 0.2.
            buffer = momentum * buffer + (1 - momentum) * g
            update = orthogonalized(momentum * buffer + (1 - momentum) * g)
            w = w - rate * (0.2 * max(old.shape) ** 0.5 * update + decay * w)
        held = optimizer.state[new]["momentum_buffer"]
        torch.testing.assert_close(held, buffer.float(), rtol=1e-6, atol=1e-7)
        # Newton and Schulz leave singular values between 0.7 and 1.2 where an SVD gives 1.
        moved = w - old.double()
        cosine = (
            torch.sum(moved * (new.detach() - old)) / moved.norm() / (new.detach() - old).norm()
        )
        assert cosine > 0.97
        assert (new.detach() - old).norm() / moved.norm() == pytest.approx(1.0, abs=0.3)


def test_settings_that_came_back_with_a_state_give_way_to_todays(make_dit_job, tmp_path):
    changes = {"optimizer": "muon", "zero_stage": 0, "precision": "fp32", "muon_momentum": 0.6}
    settings = make_dit_job(tmp_path, **ADAM | changes).settings
    optimizer = build_optimizer(small_model().parameters(), settings)
    today = {"muon_momentum": 0.9, "betas": (0.7, 0.8), "eps": 1e-5, "weight_decay": 0.25}
    apply_settings(optimizer, settings.model_copy(update=today))
    matrices, others = optimizer.param_groups
    assert (matrices["momentum"], matrices["weight_decay"]) == (0.9, 0.25)
    # Vectors are spared, as in the settings that the optimizer was built from.
    assert (others["betas"], others["eps"], others["weight_decay"]) == ((0.7, 0.8), 1e-5, 0.0)
    # Muon's own guard of a division is another thing than AdamW's.
    assert matrices["eps"] == 1e-7


@pytest.mark.parametrize("optimizer", [pytest.param("adafactor", marks=pytest.mark.slow), "muon"])
def test_whole_matrix_optimizers_resume_with_the_same_bytes_and_say_their_name(
    make_dit_job, tmp_path, optimizer
):
    changes = {"optimizer": optimizer, "zero_stage": 0, "precision": "fp32", "learning_rate": 0.01}
    whole = make_dit_job(tmp_path / "whole", **changes, steps=4)
    run_job(whole)
    run_job(make_dit_job(tmp_path / "parts", **changes, steps=2))
    parts = make_dit_job(tmp_path / "parts", **changes, steps=4)
    run_job(parts)
    resumed = raw_weights(parts)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in raw_weights(whole).items())
    card = (whole.export_dir / "raw" / "README.md").read_text(encoding="utf-8")
    assert f". {described_optimizer(whole.settings)}, learning rate" in card
    assert described_optimizer(whole.settings).lower().startswith(optimizer)


def test_a_model_card_says_what_decays(make_dit_job, tmp_path):
    settings = make_dit_job(tmp_path, **ADAM).settings
    constants = "betas 0.6, 0.8, eps 0.3, weight decay 0.4"
    assert described_optimizer(settings) == f"AdamW ({constants} except of norms and biases)"
    all_of_them = settings.model_copy(update={"decayed_weights": "all"})
    assert described_optimizer(all_of_them) == f"AdamW ({constants})"


def test_optimizers_that_need_whole_matrices_refuse_divided_ones(make_dit_job, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer 'muon' needs whole matrices.*zero_stage 0"):
        make_dit_job(tmp_path, optimizer="muon", zero_stage=2)


def raw_weights(job):
    return load_file(job.export_dir / "raw" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_states_in_host_memory_train_the_same_weights(make_dit_job, tmp_path, stage):
    here, offloaded = (
        make_dit_job(tmp_path / place, steps=2, zero_stage=stage, offload_optimizer=place)
        for place in ("none", "cpu")
    )
    run_job(here)
    run_job(offloaded)
    ours, theirs = raw_weights(here), raw_weights(offloaded)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_moments_in_8_bits_train_and_resume_with_the_same_bytes(make_dit_job, tmp_path):
    whole = make_dit_job(tmp_path / "whole", optimizer="adamw_8bit")
    run_job(whole)
    run_job(make_dit_job(tmp_path / "parts", optimizer="adamw_8bit", steps=2))
    parts = make_dit_job(tmp_path / "parts", optimizer="adamw_8bit")
    run_job(parts)
    resumed = raw_weights(parts)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in raw_weights(whole).items())


@pytest.mark.slow
def test_four_micro_batches_accumulate_the_gradient_of_one_batch(make_dit_job, tmp_path):
    """In bf16 the batch's own rounding remains; sums in bf16 would lose 8 bits of each part."""
    norms = []
    for micro in (4, 1):
        job = make_dit_job(tmp_path / str(micro), steps=1, micro_batch_size=micro)
        run_job(job)

        norms.append(
            [row["grad_norm"] for row in MetricLog(job.metrics).rows() if "grad_norm" in row]
        )
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
