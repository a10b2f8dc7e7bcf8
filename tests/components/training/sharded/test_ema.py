from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from components.training.distributed.ranks import Ranks
from components.training.sharded.ema import WeightAverage
from components.training.sharded.host_copies import HostCopies
from components.training.sharded.weight_shards import WeightShard, assemble

ALONE = Ranks(0, 1, torch.device("cpu"))


def whole(module: nn.Module) -> list[WeightShard]:
    return [WeightShard.whole(name, p) for name, p in module.named_parameters()]


def part(name: str, tensor: torch.Tensor, start: int, stop: int) -> WeightShard:
    return WeightShard(name, tuple(tensor.shape), start, tensor.flatten()[start:stop])


def undivided_average(states: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The slow, obvious reference: whole float32 tensors, one lerp a step."""
    average = states[0].clone()
    for number, weights in enumerate(states[1:]):
        average.lerp_(weights, 1.0 - min(decay, (1 + number) / (10 + number)))
    return average


def test_average_follows_the_recurrence():
    average = WeightAverage([WeightShard.whole("w", torch.zeros(3))], 0.9, ALONE)
    expected = torch.zeros(3)
    for step in range(50):
        weights = torch.full((3,), float(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
        average.update([WeightShard.whole("w", weights)])
    torch.testing.assert_close(average.shards["w"].values, expected)
    assert average.updates == 50


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    seed=st.integers(0, 1000),
)
def test_divided_averages_have_the_bits_of_an_undivided_one(shape, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(shape, generator=generator) for _ in range(12)]
    count = shape[0] * shape[1]
    edges = [0, *sorted(int(cut * count) for cut in cuts), count]
    spans = list(itertools.pairwise(edges))
    averages = [WeightAverage([part("w", states[0], *span)], 0.6, ALONE) for span in spans]
    for state in states[1:]:
        for average, span in zip(averages, spans, strict=True):
            average.update([part("w", state, *span)])
    together = torch.cat([average.shards["w"].values for average in averages])
    assert torch.equal(together.reshape(shape), undivided_average(states, 0.6))
    assert sum(average.shards["w"].values.nbytes for average in averages) == 4 * count


def test_average_of_bfloat16_weights_is_kept_in_float32():
    average = WeightAverage(
        [WeightShard.whole("w", torch.ones(2, dtype=torch.bfloat16))], 0.999, ALONE
    )
    average.update([WeightShard.whole("w", torch.full((2,), 1.0078125, dtype=torch.bfloat16))])
    assert average.shards["w"].values.dtype == torch.float32
    assert float(average.shards["w"].values[0]) != 1.0


def test_the_average_does_not_share_memory_with_the_weights():
    weights = torch.ones(2)
    average = WeightAverage([WeightShard.whole("w", weights)], 0.9, ALONE, torch.device("cpu"))
    weights.zero_()
    assert average.shards["w"].values.tolist() == [1.0, 1.0]


def test_swapping_shows_the_average_and_restores_the_bytes():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = WeightAverage(whole(model), 0.5, ALONE)
    average.update([WeightShard.whole(n, torch.ones_like(p)) for n, p in model.named_parameters()])
    storage = model.weight.data_ptr()
    with average.swapped_into(model):
        shown = average.shards["weight"].values.reshape(4, 4).bfloat16()
        assert torch.equal(model.weight, shown)
    assert model.weight.data_ptr() == storage
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_come_back_when_the_block_raises():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    zeros = [WeightShard.whole(n, torch.zeros_like(p)) for n, p in model.named_parameters()]
    average = WeightAverage(zeros, 0.5, ALONE)
    with pytest.raises(RuntimeError), average.swapped_into(model):
        raise RuntimeError
    assert torch.equal(model.weight, before)


def test_a_stored_average_continues_exactly_whatever_number_of_ranks_stored_it(tmp_path):
    model = nn.Linear(3, 5)
    tensors = dict(model.named_parameters())
    spans = {"weight": (0, 4, 15), "bias": (0, 5, 5)}
    for rank in range(2):
        shards = [
            part(name, tensors[name].detach(), edges[rank], edges[rank + 1])
            for name, edges in spans.items()
        ]
        saved = WeightAverage(shards, 0.9, Ranks(rank, 2, torch.device("cpu")))
        saved.update([WeightShard(s.name, s.shape, s.start, s.values + 1) for s in shards])
        saved.take_write(tmp_path, HostCopies())()
    undivided = WeightAverage(whole(model), 0.9, ALONE)
    undivided.update([WeightShard.whole(n, p + 1) for n, p in tensors.items()])
    loaded = WeightAverage(whole(model), 0.9, ALONE)
    loaded.load(tmp_path, saved.updates)
    for average in (undivided, loaded):
        average.update([WeightShard.whole(n, p + 2) for n, p in tensors.items()])
    for name, tensor in undivided.whole_tensors():
        assert torch.equal(tensor, dict(loaded.whole_tensors())[name])

    (tmp_path / "ema-rank00001.safetensors").unlink()
    with pytest.raises(ValueError, match="11 of 15 elements of weight"):
        WeightAverage(whole(model), 0.9, ALONE).load(tmp_path, 1)


def test_a_stored_average_of_another_model_is_refused(tmp_path):
    WeightAverage(whole(nn.Linear(3, 4)), 0.9, ALONE).take_write(tmp_path, HostCopies())()
    with pytest.raises(ValueError, match="does not fit"):
        WeightAverage(whole(nn.Linear(3, 3)), 0.9, ALONE).load(tmp_path, 1)


def test_decay_one_is_refused():
    with pytest.raises(ValueError, match="ema_decay"):
        WeightAverage([], 1.0, ALONE)


def _assemble_here(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    values = torch.tensor([-0.0, 1.5, -float("inf"), 3e-45, 2.0])
    edges = [0, 2, 5, 5]
    shard = WeightShard("w", (5, 1), edges[rank], values[edges[rank] : edges[rank + 1]])
    result = assemble(shard, Ranks(rank, world, torch.device("cpu")))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_assembling_over_three_processes_keeps_every_bit(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_assemble_here, args=(rank, 3, str(tmp_path))) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = torch.tensor([[-0.0], [1.5], [-float("inf")], [3e-45], [2.0]])
    for rank in range(3):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(result.view(torch.int32), expected.view(torch.int32))
