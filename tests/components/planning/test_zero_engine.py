"""The stand-in for DeepSpeed's memory against DeepSpeed itself, on real tensors of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.planning import zero_engine
from components.planning.live_bytes import LiveBytes
from components.planning.memory import TrainedTensors, state_bytes, update_bytes
from components.planning.zero_engine import ZeroEngine
from components.training.distributed.ranks import open_ranks
from components.training.sharded import engine as real_engine

LAYERS, WIDTH = 61, 128
PARAMETERS = LAYERS * WIDTH**2
TRAINED = TrainedTensors.of([(WIDTH, WIDTH)] * LAYERS)


def moments_of(make_engine, dtype: torch.dtype) -> list[tuple[float, ...]]:
    """(held, peak of the backward pass, held after it, peak of the update) in bytes a parameter.

    Of the second update with two micro batches each: one row for either.
    """
    with LiveBytes("cpu") as live:
        engine = make_engine(
            nn.Sequential(*(nn.Linear(WIDTH, WIDTH, False) for _ in range(LAYERS)))
        )
        rows = []
        for _ in range(2):
            rows = [moments(engine, live, dtype) for _ in range(2)]
    return rows


def moments(engine, live: LiveBytes, dtype: torch.dtype) -> tuple[float, ...]:
    live.restart()
    found = [live.live["cpu"]]
    loss = engine(torch.ones(1, WIDTH, dtype=dtype)).float().square().mean()
    engine.backward(loss)
    del loss
    found += [live.peak["cpu"], live.live["cpu"]]
    live.restart()
    engine.step()
    return tuple(count / PARAMETERS for count in (*found, live.peak["cpu"]))


@pytest.fixture
def stage(profile):
    def make(zero: int, precision: str):
        return profile("embedded").dit_stage1.model_copy(
            update={
                "precision": precision,
                "zero_stage": zero,
                "global_batch_size": 2,
                "micro_batch_size": 1,
                "optimizer": "adamw",
            }
        )

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("training_environment_restored")
@pytest.mark.parametrize(
    ("zero", "precision"), [(2, "bf16"), (1, "bf16"), (2, "fp32"), (1, "fp32"), (0, "fp32")]
)
def test_every_moment_holds_what_deepspeed_holds(stage, monkeypatch, zero, precision):
    # A layer fills a bucket, as a few layers of the 12B network do.
    monkeypatch.setattr(real_engine, "BUCKET_ELEMENTS", WIDTH**2)
    monkeypatch.setattr(zero_engine, "BUCKET_ELEMENTS", WIDTH**2)
    settings = stage(zero, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with open_ranks("cpu") as ranks:
        real = moments_of(
            lambda model: real_engine.initialize_engine(model, settings, ranks), dtype
        )

    def stand_in(model: nn.Module) -> ZeroEngine:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return ZeroEngine(model, settings, 1, torch.device("cpu"))

    ours = moments_of(stand_in, dtype)
    for theirs, mine in zip(real, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize(
    ("zero", "precision"), [(2, "bf16"), (1, "bf16"), (2, "fp32"), (1, "fp32"), (0, "fp32")]
)
def test_a_rank_holds_the_planned_states_and_update(stage, monkeypatch, zero, precision, ranks):
    monkeypatch.setattr(zero_engine, "BUCKET_ELEMENTS", WIDTH**2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    settings = stage(zero, precision).model_copy(update={"global_batch_size": ranks})

    def stand_in(model: nn.Module) -> ZeroEngine:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        engine = ZeroEngine(model, settings, ranks, torch.device("cpu"))
        # As on a GPU: one temporary for the whole share.
        engine.optimizer.param_groups[0]["foreach"] = True
        return engine

    _, (_, peak, after, update) = moments_of(stand_in, dtype)
    states = sum(state_bytes(PARAMETERS, ranks, zero, precision, TRAINED)) / PARAMETERS
    assert after == pytest.approx(states, rel=0.01)
    extra = update_bytes(TRAINED, ranks, precision, zero) / PARAMETERS
    # Some copies are made when the backward pass is through, others at the update.
    assert max(peak, update) == pytest.approx(states + extra, rel=0.03)
