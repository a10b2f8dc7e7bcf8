from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.training.sharded.elastic_resume import (
    OPTIMIZER,
    PADDINGS,
    WEIGHTS,
    WorldSizeUnsupported,
    cut,
    rank_files,
    repartition,
)


def divided(vectors: list[torch.Tensor], ranks: int, zero: bool = True) -> list[dict[str, Any]]:
    """What DeepSpeed saves per rank: parts padded to a multiple of two times the ranks."""
    states: list[dict[str, Any]] = []
    for rank in range(ranks):
        weights, paddings, moments, groups = [], [], {}, []
        for number, vector in enumerate(vectors):
            part = math.ceil(vector.numel() / (2 * ranks)) * 2
            padded = torch.zeros(part * ranks)
            padded[: vector.numel()] = vector
            mine = padded[rank * part : (rank + 1) * part]
            padding = part - max(0, min(part, vector.numel() - rank * part))
            weights.append(mine[: part - padding] if zero else mine)
            paddings.append(padding)
            moments[number] = {
                "step": torch.tensor(7.0),
                "exp_avg": mine * 2,
                "exp_avg_sq": mine**2,
            }
            groups.append({"lr": 0.1, "params": [number]})
        state = {
            WEIGHTS: weights,
            PADDINGS: paddings,
            OPTIMIZER: {"state": moments, "param_groups": groups},
            "partition_count": [ranks] * len(vectors),
        }
        states.append(state | ({"zero_stage": 2} if zero else {}))
    return states


def assert_equal(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    else:
        assert one == two


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    zero=st.booleans(),
)
def test_states_cut_anew_are_those_that_the_other_number_of_ranks_would_have_saved(
    sizes, before, after, zero
):
    vectors = [torch.arange(1.0, size + 1) + 100 * n for n, size in enumerate(sizes)]
    saved, expected = divided(vectors, before, zero), divided(vectors, after, zero)
    empty = divided([torch.zeros(size) for size in sizes], after, zero)
    for rank in range(after):
        assert_equal(repartition(saved, empty[rank], rank), expected[rank])


def test_a_cut_behind_the_end_is_padding():
    assert cut([torch.ones(3)], 4, 2, 2).tolist() == [0.0, 0.0]
    assert cut([torch.ones(3), torch.ones(2) * 2], 2, 2, 2).tolist() == [1.0, 2.0]


def test_states_without_a_value_per_weight_are_refused():
    saved = divided([torch.ones(12)], 2)
    for state in saved:
        state[OPTIMIZER]["state"][0]["exp_avg"] = torch.ones(1)
    here = divided([torch.zeros(12)], 1)[0]
    with pytest.raises(WorldSizeUnsupported, match="exp_avg has not one value per weight"):
        repartition(saved, here, 0)


def test_files_of_all_ranks_are_named_after_one():
    one = Path("engine/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert [file.name for file in rank_files(one, 2)] == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    with pytest.raises(ValueError, match="not the file of one rank"):
        rank_files(Path("mp_rank_00_model_states.pt"), 2)
