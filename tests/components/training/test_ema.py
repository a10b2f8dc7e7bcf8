from __future__ import annotations

import pytest
import torch
from torch import nn

from components.training.ema import WeightAverage


def test_average_follows_the_recurrence():
    average = WeightAverage([("w", torch.zeros(3))], decay=0.9)
    expected = torch.zeros(3)
    for step in range(50):
        weights = torch.full((3,), float(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
        average.update([("w", weights)])
    torch.testing.assert_close(average.weights["w"], expected)
    assert average.updates == 50


def test_average_of_bfloat16_weights_is_kept_in_float32():
    average = WeightAverage([("w", torch.ones(2, dtype=torch.bfloat16))], decay=0.999)
    average.update([("w", torch.full((2,), 1.0078125, dtype=torch.bfloat16))])
    assert average.weights["w"].dtype == torch.float32
    assert float(average.weights["w"][0]) != 1.0


def test_swapping_shows_the_average_and_restores_the_bytes():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = WeightAverage(model.named_parameters(), decay=0.5)
    average.update([(name, torch.ones_like(p)) for name, p in model.named_parameters()])
    storage = model.weight.data_ptr()
    with average.swapped_into(model):
        assert torch.equal(model.weight, average.weights["weight"].bfloat16())
    assert model.weight.data_ptr() == storage
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_come_back_when_the_block_raises():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = WeightAverage([(n, torch.zeros_like(p)) for n, p in model.named_parameters()], 0.5)
    with pytest.raises(RuntimeError), average.swapped_into(model):
        raise RuntimeError
    assert torch.equal(model.weight, before)


def test_restoring_continues_exactly():
    model = nn.Linear(3, 3)
    one = WeightAverage(model.named_parameters(), decay=0.9)
    one.update([(n, p + 1) for n, p in model.named_parameters()])
    two = WeightAverage(model.named_parameters(), decay=0.9)
    two.restore({n: w.clone() for n, w in one.weights.items()}, one.updates)
    for average in (one, two):
        average.update([(n, p + 2) for n, p in model.named_parameters()])
    assert all(torch.equal(one.weights[n], two.weights[n]) for n in one.weights)


def test_a_stored_average_of_another_model_is_refused():
    average = WeightAverage(nn.Linear(3, 3).named_parameters(), decay=0.9)
    with pytest.raises(ValueError, match="does not fit"):
        average.restore(dict(nn.Linear(3, 4).named_parameters()), 1)


def test_decay_one_is_refused():
    with pytest.raises(ValueError, match="ema_decay"):
        WeightAverage([], decay=1.0)
