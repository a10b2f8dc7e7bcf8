"""A process's share of the float32 weights, and whole tensors put together from all shares.

DeepSpeed divides the float32 masters over the ranks in its own way (ZeRO 1 and 2: one flat buffer
cut into equal parts; ZeRO 3: every parameter cut into equal parts). Whatever the way, a share is a
run of elements of a flattened parameter, so averaging, checkpointing and export need to know one
thing only: where the run starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.training.distributed.ranks import Ranks


@dataclass(frozen=True)
class WeightShard:
    """Elements `start` to `start + len(values)` of a flattened parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    values: Tensor
    """(n,) float32, n may be 0; a view of the weights where they are float32 on this rank."""

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> WeightShard:
        """All of `tensor`, any floating dtype."""
        return cls(name, tuple(tensor.shape), 0, tensor.detach().float().flatten())


def master_shards(engine: Any, ranks: Ranks) -> Iterator[WeightShard]:
    """This rank's share of every trainable parameter, in the model's order, without communication.

    Together the ranks' shares cover each parameter exactly once. Where every rank holds the whole
    float32 parameter (no ZeRO), each takes an equal part.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield _master_shard(name, parameter, ranks)


def _master_shard(name: str, parameter: Any, ranks: Ranks) -> WeightShard:
    if is_partitioned(parameter):
        from deepspeed.utils import safe_get_local_fp32_param

        shape = tuple(parameter.ds_shape)
        padded = safe_get_local_fp32_param(parameter)
        # A small parameter may end before the parts of the last ranks begin; theirs are empty.
        start = min(ranks.rank * padded.numel(), math.prod(shape))
        # The last ranks' parts are padded to the common length.
        count = min(padded.numel(), math.prod(shape) - start)
        return WeightShard(name, shape, start, padded.detach()[:count])
    shape = tuple(parameter.shape)
    if hasattr(parameter, "_hp_mapping"):
        # ZeRO 1 and 2: DeepSpeed keeps on each parameter where its float32 master lies; None: on
        # another rank.
        mapping = parameter._hp_mapping
        if mapping is None:
            return WeightShard(name, shape, 0, torch.empty(0, device=ranks.device))
        start = mapping.lp_fragment_address.start
        # A view, so that the average reads the masters without a copy of them.
        return WeightShard(name, shape, start, mapping.hp_fragment.detach())
    # No ZeRO: everyone has all of it, and averages an equal part.
    part = math.ceil(parameter.numel() / ranks.world_size)
    start = min(ranks.rank * part, parameter.numel())
    mine = parameter.detach().flatten()[start : start + part]
    return WeightShard(name, shape, start, mine.float())


@torch.no_grad()
def set_master(name: str, parameter: Any, whole: Tensor, ranks: Ranks) -> None:
    """Put this rank's share of a whole float32 parameter in place of its master.

    What the model computes with does not change.

    Args:
        name: of the parameter, for the shard.
        parameter: trainable, of an engine that keeps masters apart from the weights.
        whole: float32, on any device.
        ranks: this process.
    """
    shard = _master_shard(name, parameter, ranks)
    mine = whole.flatten()[shard.start : shard.start + shard.values.numel()]
    if not is_partitioned(parameter):
        shard.values.copy_(mine)
        return
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    # Where masters are offloaded the shard is a copy: DeepSpeed itself has to write, padding too.
    padded = safe_get_local_fp32_param(parameter)
    padded[: mine.numel()] = mine.to(padded.device)
    safe_set_local_fp32_param(parameter, padded)


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO 3 has divided this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def assemble(shard: WeightShard, ranks: Ranks) -> Tensor:
    """The whole float32 parameter on every rank (on the ranks' device); collective.

    Exact: the bits are added as integers, to which the other ranks contribute zeros.
    """
    count = math.prod(shard.shape)
    if ranks.world_size == 1:
        assert shard.values.numel() == count
        return shard.values.to(ranks.device).reshape(shard.shape)
    whole = torch.zeros(count, dtype=torch.float32, device=ranks.device)
    whole[shard.start : shard.start + shard.values.numel()] = shard.values
    # Collective: every rank comes here for every parameter, in the model's order.
    # As integers: added as floats, -0.0 + 0.0 would become 0.0.
    dist.all_reduce(whole.view(torch.int32))
    return whole.reshape(shard.shape)


def model_values(parameter: Any, like: WeightShard) -> WeightShard:
    """The values that the model computes with, for the same elements as `like` (a copy)."""
    stored = parameter.ds_tensor.data if is_partitioned(parameter) else parameter.detach().flatten()
    # ZeRO 3 holds this rank's elements only, so they start at 0.
    first = 0 if is_partitioned(parameter) else like.start
    mine = stored[first : first + like.values.numel()]
    # A copy, since the storage is about to be overwritten.
    return WeightShard(like.name, like.shape, like.start, mine.clone())


@torch.no_grad()
def write_model_values(parameter: Any, shard: WeightShard, ranks: Ranks) -> None:
    """Let the model compute with these values (rounded to its dtype); collective.

    Values are copied in place because DeepSpeed keeps views of the parameters' storage. Float32
    masters that are kept apart do not change. With ZeRO 3 each rank writes its own part.
    """
    if is_partitioned(parameter):
        parameter.ds_tensor.data[: shard.values.numel()].copy_(shard.values)
    else:
        parameter.copy_(assemble(_as_float32(shard), ranks))


def _as_float32(shard: WeightShard) -> WeightShard:
    return WeightShard(shard.name, shard.shape, shard.start, shard.values.float())


def release_gathered(module: nn.Module) -> None:
    """Free what ZeRO 3 has put together for computing, so that the parts are read again."""
    parameter: Any
    for parameter in module.parameters():
        if is_partitioned(parameter):
            # Every parameter names the same optimizer: once is enough.
            parameter._z3_optimizer.empty_partition_cache()
            return
