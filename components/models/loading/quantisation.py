"""Frozen networks in 8 or 4 bits a weight, by diffusers' own quantisers.

What is rounded are the linear layers of the blocks: all but a hundredth of a transformer's weights.
Layers outside (the embedders, the last modulation and projection) stay as they are: they are small,
and every error of theirs reaches the picture undivided.

- `int8` (torchao, weights only): a scale for each row.
- `fp8` (torchao, weights only): E4M3 with a scale for each row.
- `nf4` (bitsandbytes; QLoRA, 2305.14314): 16 levels of a normal distribution, and a scale for each
  64 weights.

Products run in the network's own precision, so gradients flow through; the weights themselves
cannot be trained.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from components.files.install_hints import install_hint
from components.settings.models import Quantisation
from components.settings.training import DitStageSettings

_LIBRARY = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
# T5 takes its input to the dtype of this layer's weights, which says nothing where they are packed.
_READ_FOR_ITS_DTYPE = ("wo",)


class QuantisationUnavailable(ValueError):
    """Why weights cannot be rounded here; one line."""


def require_library(kind: Quantisation, setting: str) -> None:
    """Refuse a kind whose library is not installed.

    Args:
        kind: value of the setting.
        setting: its dotted name, for the message.

    Raises:
        QuantisationUnavailable: names the command that installs it.
    """
    library = _LIBRARY.get(kind)
    if library is not None and find_spec(library) is None:
        raise QuantisationUnavailable(f"{setting} {kind} needs {library}: {install_hint('gpu')}")


def training_problem(kind: Quantisation, stage: DitStageSettings) -> str | None:
    """Why a stage cannot train on weights of this kind; None: it can."""
    if kind == "none":
        return None
    name = f"models.transformer.quantisation {kind}"
    if stage.adapter is None:
        return f"{name} freezes the weights, and adapter null trains them: set an adapter, or none"
    if kind == "nf4" and stage.offload_base:
        return f"{name} has scales that offload_base does not move: use int8, fp8 or none"
    if stage.zero_stage == 3:
        return f"{name} cannot be divided over ranks: use zero_stage 0, 1 or 2, not 3"
    return None


def is_quantised(parameter: Tensor) -> bool:
    """Whether these are rounded weights, which no cast may touch."""
    # By name: bitsandbytes takes a second to import, and most networks have none of its weights.
    return is_traceable_wrapper_subclass(parameter) or type(parameter).__name__ == "Params4bit"


def quantised_layers(model: nn.Module, kind: Quantisation) -> Iterator[tuple[nn.Module, str]]:
    """(owner, name in it) of every layer that `quantise` rounds: the blocks' linear layers."""
    for parts in model.modules():
        if not isinstance(parts, nn.ModuleList):
            continue
        for owner in parts.modules():
            for name, layer in owner.named_children():
                read = kind == "nf4" and name in _READ_FOR_ITS_DTYPE
                if type(layer) is nn.Linear and not read:
                    yield owner, name


def _configuration(kind: Quantisation, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    chosen = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(chosen)


@torch.no_grad()
def quantise(
    model: Any,
    kind: Quantisation,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    setting: str = "models.transformer.quantisation",
) -> None:
    """Round a network in place, layer by layer, and freeze it.

    Args:
        model: of diffusers or transformers, on the CPU or on `device`.
        kind: `none` does nothing.
        dtype: in which products run; the blocks' weights are rounded to it first.
        device: where the rounded layers go; the rest stays where it is.
        setting: for messages.

    Raises:
        QuantisationUnavailable: the library is not installed.
    """
    if kind == "none":
        return
    require_library(kind, setting)
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    config = _configuration(kind, dtype)
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    # A list before anything is replaced; blocks within blocks would come twice.
    layers = {
        id(owner._modules[name]): (owner, name) for owner, name in quantised_layers(model, kind)
    }
    if not layers:
        raise QuantisationUnavailable(
            f"{setting} {kind}: {type(model).__name__} has no plain linear layers to round (a GGUF "
            "file's are rounded already); use none"
        )
    model.requires_grad_(False)
    for owner, name in layers.values():
        layer = owner._modules[name]
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach().to(device, dtype)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(device, dtype)
        if kind == "nf4":
            _replace_by_4bit(owner, name, config)
            layer = owner._modules[name]
        quantizer.create_quantized_param(layer, weight, "weight", torch.device(device), {}, [])
        del layer, weight
    model.requires_grad_(False)
    gc.collect()


def _replace_by_4bit(owner: nn.Module, name: str, config: Any) -> None:
    """Diffusers' exchange of one layer, its bias kept."""
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    before = owner._modules[name]
    assert isinstance(before, nn.Linear)
    # A parent of its own: the function walks over all children.
    parent = nn.Module()
    parent.add_module(name, before)
    replace_with_bnb_linear(parent, [], quantization_config=config)
    after: Any = parent._modules[name]
    after.bias = before.bias
    # On CPUs with AVX512-BF16 evaluation would pack the weights anew with scales in bfloat16: other
    # results than in training, and none at all for widths below a block.
    after.support_avx512bf16_for_cpu = False
    owner._modules[name] = after.train(before.training)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a network's weights as they are held, scales included."""
    total = 0
    for parameter in model.parameters():
        for tensor in _held(parameter):
            total += tensor.numel() * tensor.element_size()
    return total


def _held(parameter: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(parameter):
        names, _ = parameter.__tensor_flatten__()
        for name in names:
            yield from _held(getattr(parameter, name))
        return
    yield parameter.detach()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield state.absmax
