"""Context parallelism: the tokens of one sample divided over several ranks (Ulysses).

Ranks 0 to d - 1 form the first group, the next d the second, and so on. All ranks of a group get
the same samples. Each runs its part of the tokens through the network, except in attention, where
an all-to-all gives it all tokens of its part of the heads (Jacobs et al., 2309.14509; diffusers'
implementation). The velocities are gathered, so every rank of a group computes the same loss.

A rank's backward pass follows its own tokens only, so the gradient of a sample is the sum over its
group. ZeRO averages over all ranks: the trainer multiplies the loss by d.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from components.training.distributed.ranks import Ranks

_SETTING = "runtime.context_parallel_degree"
# diffusers asks for both ways of dividing; only the second is used.
_AXES = ("ring", "ulysses")


def context_parallel_problem(
    degree: int, heads: int, text_tokens: int, buckets: Iterable[tuple[str, int]]
) -> str | None:
    """What cannot be divided by `degree`, in one line; None: everything can.

    Args:
        degree: ranks of a group.
        heads: attention heads.
        text_tokens: text tokens of a sample; they are divided apart from the image's.
        buckets: (name, image tokens) of the aspect-ratio buckets.
    """
    # The all-to-all exchanges parts of the tokens for parts of the heads: both must divide evenly.
    parts = [(f"the transformer has {heads} attention heads", heads)]
    parts.append((f"a sample has {text_tokens} text tokens", text_tokens))
    parts += [(f"bucket {name} has {tokens} image tokens", tokens) for name, tokens in buckets]
    for text, count in parts:
        if count % degree:
            return f"{_SETTING} {degree}: {text}, which it does not divide; lower it"
    return None


def check_context_parallel(model: Any, degree: int, text_tokens: int, index: pd.DataFrame) -> None:
    """Refuse a transformer or a bucket whose tokens cannot be divided.

    Args:
        model: bare transformer.
        degree: ranks of a group, at least 2.
        text_tokens: of a sample.
        index: of the latent store; gives the buckets.

    Raises:
        ValueError: see there; or the class cannot be divided at all.
    """
    if getattr(model, "_cp_plan", None) is None:
        raise ValueError(
            f"{_SETTING} {degree}: {type(model).__name__} cannot divide its tokens; set it to 1"
        )
    sizes = zip(index["bucket"], index["latent_h"], index["latent_w"], strict=True)
    # A token is a 2x2 block of latents.
    buckets = sorted({(str(name), int(h) // 2 * (int(w) // 2)) for name, h, w in sizes})
    heads = int(model.config.num_attention_heads)
    problem = context_parallel_problem(degree, heads, text_tokens, buckets)
    if problem is not None:
        raise ValueError(problem)


def enable_context_parallel(model: Any, ranks: Ranks) -> None:
    """Divide the tokens of `model` over the ranks of each group; collective.

    Does what diffusers' `enable_parallelism` does with its "native" attention, which divides by
    the number of accelerators and so fails on a machine without any. The native attention runs
    its forward pass once more in the backward pass.

    Args:
        model: bare diffusers transformer on which `check_context_parallel` found nothing.
        ranks: all ranks; `ranks.context_degree` is above 1.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    # Here, because the planner asks this module without torch.
    from torch.distributed.device_mesh import init_device_mesh

    degree = ranks.context_degree
    # The last axis counts fastest: a group is `degree` neighbours, as in `Ranks.data_rank`.
    mesh = init_device_mesh(
        ranks.device.type, (ranks.data_world_size, 1, degree), mesh_dim_names=("data", *_AXES)
    )
    context = ContextParallelConfig(ulysses_degree=degree, mesh=mesh[_AXES])
    config = ParallelConfig(context_parallel_config=context)
    config.setup(ranks.rank, ranks.world_size, ranks.device, mesh=context.mesh)
    model._parallel_config = config
    model.set_attention_backend("native")
    # diffusers hands the configuration to attention processors in `enable_parallelism`.
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    # Last: its hooks divide what enters the model and gather what leaves it.
    apply_context_parallel(model, context, model._cp_plan)
