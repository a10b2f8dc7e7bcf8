"""Low-rank adapters (LoRA): the weights stay as they are, small factors beside them are trained.

A layer computes W x + (alpha / rank) B A x; B starts at zero, so training starts from the base's
own output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.files.install_hints import install_hint
from components.settings.training import AdapterSettings
from components.training.dit.export import Card, save_transformer

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def add_adapter(model: Any, settings: AdapterSettings, seed: int) -> None:
    """Freeze `model` and put trainable factors beside the layers that the settings name.

    Args:
        model: a diffusers transformer.
        settings: rank, scale and layers.
        seed: of the factors A.

    Raises:
        ValueError: no layer has a name of `target_modules`, or peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError(f"adapter needs peft: {install_hint()}") from None

    names = [name for name, _ in model.named_modules()]
    for target in settings.target_modules:
        # The same rule by which peft matches names; peft itself is content when one of them
        # matches.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"adapter.target_modules: {type(model).__name__} has no layer {target!r}; "
                "attention has to_q, to_k, to_v and to_out.0"
            )
    # Before the factors are there, which are to be trained.
    model.requires_grad_(False)
    # Equal factors on every rank, and no trace in the caller's random state.
    with torch.random.fork_rng(devices=[]):
        # peft draws A from the global generator; there is no generator to hand over.
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules=list(settings.target_modules),
            )
        )


def adapter_parameters(model: Any, settings: AdapterSettings) -> int:
    """Number of trained values of an adapter.

    Args:
        model: a transformer on the meta device; changed by the call.
        settings: of the adapter.

    Raises:
        ValueError: as `add_adapter`.
    """
    # Sizes only: the planner asks this of networks that do not fit into its memory.
    with torch.device("meta"):
        add_adapter(model, settings, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapted(
    base: Any,
    settings: AdapterSettings,
    factors: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_gb: float,
    card: Card,
) -> None:
    """Write base and adapter merged as a diffusers folder, with the adapter alone beside it.

    The merge is done in float32 on the weights that training started from, so what the frozen
    weights lost by rounding to bfloat16 for training does not reach the result.

    Args:
        base: the transformer without adapter, float32; changed by the call.
        settings: as in training.
        factors: trained parameters by their names in the adapted model.
        folder: replaced if it exists. `ADAPTER_FILE` in it is in the layout that
            `load_lora_weights` of the stock pipelines reads.
        max_shard_gb: as in `save_transformer`.
        card: as in `save_transformer`.

    Raises:
        ValueError: `factors` are not those of this adapter on `base`.
    """
    add_adapter(base, settings, seed=0)
    # `load_state_dict` below cannot be strict (the base is not among the factors), so names are
    # compared here.
    expected = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    if expected != set(factors):
        different = sorted(expected ^ set(factors))[:4]
        raise ValueError(f"trained factors do not fit the adapter; they differ in {different}")
    base.load_state_dict(dict(factors), strict=False)
    # Before the merge, which consumes the factors.
    alone, described = _stock_layout(base)
    # Fused, then the layers taken out again: the folder must load where nobody has peft.
    base.fuse_lora()
    base.unload_lora()
    # As a fresh model has it: frozen is how it was trained, not what it is.
    base.requires_grad_(True)

    def save_alone(aside: Path) -> None:
        from diffusers import FluxPipeline
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

        def write(tensors: dict[str, Tensor], path: str) -> None:
            # One entry of metadata only: the order of several differs from process to process.
            save_file(tensors, path, metadata={LORA_ADAPTER_METADATA_KEY: described})

        # The layout is the same for every pipeline: keys begin with "transformer.".
        FluxPipeline.save_lora_weights(aside, transformer_lora_layers=alone, save_function=write)

    save_transformer(
        base,
        base.state_dict(),
        folder,
        max_shard_gb=max_shard_gb,
        card=card,
        beside=save_alone,
    )


def _stock_layout(model: Any) -> tuple[dict[str, Tensor], str]:
    """Factors by the names that diffusers stores, and peft's settings of them as JSON."""
    from peft.utils import get_peft_model_state_dict

    factors = {
        name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()
    }
    described = model.peft_config["default"].to_dict()
    # The order of a set differs from process to process.
    metadata = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in described.items()
    }
    return factors, json.dumps(metadata, sort_keys=True)
