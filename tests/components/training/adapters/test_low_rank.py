"""Changes of low rank against the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from components.training.adapters.low_rank import LowRank, added, reduced


def random_change(seed: int, ranks: dict[str, int]) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, 20, generator=generator), torch.randn(30, rank, generator=generator)
        )
        for name, rank in ranks.items()
    }


def test_a_sum_is_exact_at_the_sum_of_the_ranks():
    first, second = random_change(1, {"a": 3, "b": 2}), random_change(2, {"b": 4, "c": 1})
    total = added(first, second)
    assert {name: one.rank for name, one in total.items()} == {"a": 3, "b": 6, "c": 1}
    both = first["b"].matrix() + second["b"].matrix()
    torch.testing.assert_close(total["b"].matrix(), both, rtol=1e-12, atol=1e-12)
    assert torch.equal(total["a"].matrix(), first["a"].matrix())
    assert torch.equal(total["c"].matrix(), second["c"].matrix())


def test_layers_of_different_shapes_are_not_added():
    other = {"a": LowRank(torch.ones(1, 7), torch.ones(30, 1))}
    with pytest.raises(ValueError, match=r"layer a is \(30, 20\) in one and \(30, 7\)"):
        added(random_change(1, {"a": 3}), other)


def test_a_cut_is_the_best_there_is_and_says_what_it_misses():
    """Against the singular values of the whole matrices."""
    change = random_change(3, {"a": 6, "b": 2})
    cut, missing = reduced(change, 3)
    left, values, right = torch.linalg.svd(change["a"].matrix(), full_matrices=False)
    best = left[:, :3] * values[:3] @ right[:3]
    torch.testing.assert_close(cut["a"].matrix(), best, rtol=1e-5, atol=1e-5)
    assert cut["a"].rank == 3
    assert cut["b"] is change["b"]
    difference = sum(
        float((change[name].matrix() - cut[name].matrix()).square().sum()) for name in change
    )
    whole = sum(float(change[name].matrix().square().sum()) for name in change)
    assert missing == pytest.approx((difference / whole) ** 0.5, rel=1e-4)
    assert 0.1 < missing < 0.9
    assert reduced(change, 6) == (change, 0.0)
