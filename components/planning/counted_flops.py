"""Operations and saved tensors of real networks, counted without values.

Nothing is computed and no memory is taken: tensors have shapes only, so the 12B network at 4096 px
is counted on a laptop in seconds. This is the reference of the closed forms in `flops` and
`memory`, and the only route for backbones that have none.

Operations are counted on the meta device, where `scaled_dot_product_attention` falls apart into two
batched products. Saved tensors are counted on the fake GPU (`fake_gpu`): what a GPU's fused kernels
keep of attention and of RMS norms is another thing than what the products and squares would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from components.models.backbone import Backbone
from components.models.backbones import BACKBONES
from components.planning.fake_gpu import GPU, fake_gpu
from components.planning.flops import Flops
from components.planning.model_shapes import FluxShape
from components.settings.models import TransformerSettings
from components.training.sharded.activation_checkpointing import STORED_OPERATORS


def flux_model(shape: FluxShape, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The real transformer class on the current device, in training mode."""
    from components.models.transformer import UltraFluxTransformer2DModel

    head = shape.attention_head_dim
    # Rotary channels do not change any count; each axis needs an even share.
    share = head // 8 * 2
    model = UltraFluxTransformer2DModel(
        **vars(shape), axes_dims_rope=(head - 2 * share, share, share)
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # Training mode, in which checkpointing is active.
    return model.train()


def flux_on_meta(shape: FluxShape, dtype: torch.dtype = torch.bfloat16) -> Any:
    """`flux_model` without storage."""
    # 12B parameters in bf16 would take 24 GB; here they take none.
    with torch.device("meta"):
        return flux_model(shape, dtype)


def flux_call(
    model: Any, grid_hw: tuple[int, int], text_tokens: int, batch: int = 1
) -> Callable[[], Tensor]:
    """A forward pass of a Flux transformer on its device."""
    config, first = model.config, next(model.parameters())
    device, dtype = first.device, first.dtype
    tokens = grid_hw[0] * grid_hw[1]

    def call() -> Tensor:
        with device:
            image = torch.empty(batch, tokens, config.in_channels, dtype=dtype)
            text = torch.empty(batch, text_tokens, config.joint_attention_dim, dtype=dtype)
            pooled = torch.empty(batch, config.pooled_projection_dim, dtype=dtype)
            t = torch.empty(batch)
        output: Tensor = model(
            hidden_states=image,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=t,
            guidance=t if config.guidance_embeds else None,
            grid_hw=grid_hw,
            return_dict=False,
        )[0]
        return output

    return call


def backbone_call(
    backbone: Backbone, model: Any, latent_hw: tuple[int, int], text_tokens: int, batch: int = 1
) -> Callable[[], Tensor]:
    """A forward pass of any backbone's transformer on its device."""
    channels, text_width, pooled_width = backbone.shape(model)
    first = next(model.parameters())
    device, dtype = first.device, first.dtype

    def call() -> Tensor:
        with device:
            return backbone.predict(
                model,
                torch.empty(batch, channels, *latent_hw, dtype=dtype),
                torch.empty(batch),
                torch.empty(batch, text_tokens, text_width, dtype=dtype),
                torch.empty(batch, pooled_width, dtype=dtype),
                # Its value changes no operation.
                guidance_scale=1.0,
                dtype=dtype,
            )

    return call


def linear_layers(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of every layer that an adapter can be put beside."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            yield name, layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d):
            # The kernel belongs to A; B is a 1x1 convolution.
            area = layer.kernel_size[0] * layer.kernel_size[1]
            yield name, layer.in_channels * area, layer.out_channels


def count(call: Callable[[], Tensor], *, backward: bool = True) -> Flops:
    """`FlopCounterMode`'s operations of a call and of its backward pass.

    With activation checkpointing switched on in the model, `backward` includes what is repeated.
    """
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        output = call()
        forward = counter.get_total_flops()
        if backward:
            # The sum adds no product, and its gradient reaches every output.
            output.sum().backward()
    return Flops(forward, counter.get_total_flops() - forward)


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, parameters aside.

    Call inside `fake_gpu`, with a model that was made there.

    Storages are counted once, however many views of them are kept.
    """
    # Weights are kept for the backward pass too, but are counted as weights.
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            # Holding the tensor keeps its storage's address from being given to another one.
            kept[storage._cdata] = tensor
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _ProductResults(TorchDispatchMode):
    """Bytes that matrix products and attention give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in STORED_OPERATORS:
            # Attention gives several tensors, of which checkpointing keeps all.
            leaves = tree_leaves(result)
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def product_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of what selective activation checkpointing keeps, were all of `call` checkpointed.

    Call inside `fake_gpu`.
    """
    # Without autograd: only the forward pass's results can be kept.
    with torch.no_grad(), _ProductResults() as results:
        call()
    return results.bytes


def backbone_model(
    settings: TransformerSettings,
    config: Mapping[str, Any] | None,
    widths: tuple[int, int],
    latent: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """A transformer without closed form on the current device, in training mode.

    Arguments as of `backbone_counts`.
    """
    backbone = BACKBONES[settings.backbone]
    if config is None:
        # The seed is without effect where there are no values.
        model = backbone.build_tiny(settings, widths, latent[0], 0)
    else:
        model = backbone.from_config(config, latent[1:])
    # Parameters alone: SD3's table of positions is a buffer and stays float32, as in training.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


def backbone_counts(
    settings: TransformerSettings,
    config: Mapping[str, Any] | None,
    widths: tuple[int, int],
    latent: tuple[int, int, int],
    text_tokens: int,
) -> tuple[int, Flops, int, tuple[int, int, int]]:
    """Counts of a backbone that has no closed form, for one sample in bf16.

    Args:
        settings: names backbone and tiny shape.
        config: diffusers configuration; None: the tiny transformer.
        widths: (D, P) of text states and pooled vectors.
        latent: (C, h, w) in latent pixels.
        text_tokens: text tokens.

    Returns:
        (parameters, operations of forward and backward, bytes saved for the backward pass,
        (bytes of all blocks' inputs, bytes of all products' results, number of blocks)).
    """
    backbone = BACKBONES[settings.backbone]
    with torch.device("meta"):
        model = backbone_model(settings, config, widths, latent)
    call = backbone_call(backbone, model, latent[1:], text_tokens)
    blocks, width = backbone.blocks(model)
    # Latents are taken in 2x2 patches.
    tokens = latent[1] * latent[2] // 4 + text_tokens
    # bf16, as the model above; `Transformer._counted` scales to other precisions.
    inputs = 2 * blocks * tokens * width
    with fake_gpu():
        with GPU:
            traced = backbone_model(settings, config, widths, latent)
        traced_call = backbone_call(backbone, traced, latent[1:], text_tokens)
        saved, products = saved_bytes(traced, traced_call), product_bytes(traced_call)
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        count(call),
        saved,
        (inputs, products, blocks),
    )
