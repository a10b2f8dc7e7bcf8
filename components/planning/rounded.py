"""Frozen weights in 8 or 4 bits, as plans count them and as traces hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from components.models.loading.transformer_blocks import transformer_blocks
from components.settings.models import Quantisation

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.planning.model_shapes import T5Shape
    from components.planning.transformer import Transformer

NF4_BLOCK = 64
"""Weights that share a float32 scale in nf4 (bitsandbytes' default)."""


def layer_bytes(kind: Quantisation, inputs: int, outputs: int, item: int) -> int:
    """Of one rounded (outputs, inputs) matrix and its scales.

    Args:
        kind: how it is held.
        inputs: columns.
        outputs: rows.
        item: bytes of an unrounded value.
    """
    values = inputs * outputs
    if kind == "none":
        return item * values
    if kind == "nf4":
        return values // 2 + 4 * -(-values // NF4_BLOCK)
    # torchao's float32 scale of a row, whatever the weights' type, and for int8 a zero point of a
    # byte.
    return values + (5 if kind == "int8" else 4) * outputs


def saved_bytes(transformer: Transformer, kind: Quantisation, item: int) -> int:
    """What a transformer's rounded blocks take less than unrounded ones."""
    return sum(
        item * inputs * outputs - layer_bytes(kind, inputs, outputs, item)
        for name, inputs, outputs in transformer.linear_layers()
        if "transformer_blocks." in name
    )


def waiting_bytes(transformer: Transformer, kind: Quantisation, item: int) -> int:
    """What is not on the GPU of frozen blocks that wait on the host: all but the widest one."""
    blocks: dict[str, int] = {}
    for name, inputs, outputs in transformer.linear_layers():
        owner, _, rest = name.partition("transformer_blocks.")
        if rest:
            block = owner + rest.partition(".")[0]
            blocks[block] = blocks.get(block, 0) + layer_bytes(kind, inputs, outputs, item)
    return sum(blocks.values()) - max(blocks.values(), default=0)


def widest_block(transformer: Transformer) -> int:
    """Weights of the block with the most of them."""
    blocks: dict[str, int] = {}
    for name, inputs, outputs in transformer.linear_layers():
        kind, _, rest = name.partition("transformer_blocks.")
        if rest:
            block = kind + rest.partition(".")[0]
            blocks[block] = blocks.get(block, 0) + inputs * outputs
    return max(blocks.values(), default=0)


def text_saved_bytes(shape: T5Shape, kind: Quantisation, item: int) -> int:
    """What T5's rounded layers take less; those of CLIP are left as they are here (a bound)."""
    inner = shape.num_heads * shape.d_kv
    layers = [(shape.d_model, inner)] * 3 + [(inner, shape.d_model)]
    layers += [(shape.d_model, shape.d_ff)] * 2
    # Its last layer is read for its dtype and stays, in nf4.
    layers += [] if kind == "nf4" else [(shape.d_ff, shape.d_model)]
    return shape.num_layers * sum(
        item * inputs * outputs - layer_bytes(kind, inputs, outputs, item)
        for inputs, outputs in layers
    )


def round_fake(model: Any, kind: Quantisation, dtype: torch.dtype, device: Any) -> None:
    """Round a network of fake tensors: torchao's own code; of nf4 bitsandbytes' own product.

    bitsandbytes' parameter is a tensor type that cannot stand for a fake tensor: its layer is
    replaced by one that holds the same bytes and calls the same function.
    """
    from components.models.loading.quantisation import quantise, quantised_layers

    if kind != "nf4":
        quantise(model, kind, dtype=dtype, device=device)
        return
    model.requires_grad_(False)
    for owner, name in list(quantised_layers(model, kind)):
        owner._modules[name] = _packed(owner._modules[name], dtype, device)


def _packed(layer: Any, dtype: torch.dtype, device: Any) -> nn.Module:
    import torch
    from bitsandbytes.autograd import _functions
    from bitsandbytes.functional import QuantState
    from torch import nn

    class Packed(nn.Linear):
        """A linear layer in nf4; of its kind, so that adapters find it."""

        packed: Tensor

        def forward(self, input: Tensor) -> Tensor:
            """Product of packed weights by bitsandbytes."""
            return _functions.matmul_4bit(input, self.packed, quant_state=state, bias=self.bias)

    with torch.device("meta"):
        made = Packed(layer.in_features, layer.out_features, bias=layer.bias is not None)
    values = layer.in_features * layer.out_features
    with torch.device(device):
        packed = torch.empty(-(-values // 2), 1, dtype=torch.uint8)
        absmax = torch.empty(-(-values // NF4_BLOCK))
        code = torch.empty(16)
        # Stands in for the weight where its dtype and device are asked for.
        weight = torch.empty(0, dtype=dtype)
    state = QuantState(
        absmax=absmax,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=code,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    made.register_buffer("packed", packed)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)


def wait_on_host(model: Any, device: Any) -> None:
    """Let the blocks of a fake network wait on the fake host, as group offloading does.

    Its hooks exchange the storage of parameters, which fake tensors cannot do between devices. Here
    a block computes with copies that live as long as its turn, beside those of the next block,
    which on a GPU travels meanwhile.

    Args:
        model: of fake tensors on `device`; all that stands in no list of blocks stays there.
        device: where blocks compute.
    """
    from torch import nn

    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {id(part) for blocks in lists for block in blocks for part in block.modules()}
    for blocks in lists:
        # Blocks alone, not the lists of layers within them.
        if id(blocks) in inner:
            continue
        for block in blocks:
            for part in block.modules():
                for name, weights in part._parameters.items():
                    if weights is not None:
                        waiting = weights.detach().to("cpu")
                        part._parameters[name] = nn.Parameter(waiting, requires_grad=False)
        members = list(blocks)
        for number, block in enumerate(members):
            following = members[number + 1] if number + 1 < len(members) else None
            blocks[number] = _waiting(block, following, device)


def frozen_wait_on_host(model: Any, device: Any) -> None:
    """Likewise the frozen weights of blocks alone (`block_offload.offload_frozen_blocks`).

    A block computes with copies of them; what autograd saves of these lives on as on a GPU.
    """
    from torch import nn

    for block in transformer_blocks(model):
        for part in block.modules():
            for leaf, weights in part._parameters.items():
                if weights is not None and not weights.requires_grad:
                    waiting = weights.detach().to("cpu")
                    part._parameters[leaf] = nn.Parameter(waiting, requires_grad=False)
        block.forward = _on_copies(block, device)


def _on_copies(block: Any, device: Any) -> Callable[..., Any]:
    from torch.func import functional_call

    def forward(*args: Any, **kwargs: Any) -> Any:
        here = {
            name: one.to(device) for name, one in block.named_parameters() if not one.requires_grad
        }
        # The block's own forward, which the call below looks up.
        del block.forward
        try:
            return functional_call(block, here, args, kwargs)
        finally:
            block.forward = forward

    return forward


def _waiting(block: Any, following: Any, device: Any) -> nn.Module:
    from torch import nn
    from torch.func import functional_call

    class Waiting(nn.Module):
        """A block whose weights come for its turn."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The block on copies of its weights."""
            here = {name: one.to(device) for name, one in block.named_parameters()}
            ahead = [one.to(device) for one in following.parameters()] if following else []
            result = functional_call(block, here, args, kwargs)
            del ahead
            return result

        def __getattr__(self, name: str) -> Any:
            # What a network asks of its blocks, such as their kind of attention.
            return getattr(block, name)

    return Waiting()
