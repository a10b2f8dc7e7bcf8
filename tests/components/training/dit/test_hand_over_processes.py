"""What a stage learned arrives in the masters of several ranks, however ZeRO divides them."""

from __future__ import annotations

import pytest

from components.training.dit.worker import run_job
from components.training.sharded.hand_over import noted_hand_overs

pytestmark = pytest.mark.usefixtures("training_environment_restored")


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_start_from_what_one_has_learned(make_dit_job, tmp_path, zero_stage, precision):
    rate = {"steps": 1, "learning_rate": 1e-6, "warmup_steps": 0, "checkpoint_every": 1}
    first = make_dit_job(tmp_path / "first", **rate)
    run_job(first)
    exported = noted_hand_overs(first.state_dir)[-1]
    second = make_dit_job(
        tmp_path / "second", processes=2, zero_stage=zero_stage, precision=precision, **rate
    ).model_copy(update={"initial_weights": first.export_dir / "ema"})
    run_job(second)
    load, *exports = noted_hand_overs(second.state_dir)
    assert (load.where, load.error) == ("load", 0.0)
    # One AdamW step moves no weight further than the rate.
    assert 0 < load.moved == exported.moved
    assert [hand_over.kept for hand_over in exports] == [1.0, 1.0]
