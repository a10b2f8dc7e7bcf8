"""Low-rank adapters (LoRA): the weights stay as they are, small factors beside them are trained.

A layer computes W x + (alpha / rank) B A x; B starts at zero, so training starts from the base's
own output.

What is exported beside the merged weights is one adapter against the weights that anybody can have:
where training started from weights that were themselves a base and an adapter, both changes are
added up (exact at the sum of the ranks).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components.files.install_hints import install_hint
from components.settings.bad_input import BadInput
from components.settings.training import AdapterSettings
from components.training.adapters.adapter_files import (
    ADAPTER_FILE,
    BACKBONE,
    BASE_SHA256,
    BASE_TITLE,
    MISSING,
    STAGES,
    Adapter,
    read_adapter,
    write_adapter,
)
from components.training.adapters.low_rank import Change, LowRank, added
from components.training.dit.export import Card, save_transformer
from components.training.dit.job import DitJob


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

    settings.check([name for name, _ in model.named_modules()], type(model).__name__)
    # Before the factors are there, which are to be trained.
    model.requires_grad_(False)
    # Equal factors on every rank, and no trace in the caller's random state.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # It says that a rounded layer cannot take factors in; what is exported is the unrounded
        # base with them.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear")
        # peft draws A from the global generator; there is no generator to hand over.
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules=list(settings.target_modules),
            )
        )


@dataclass(frozen=True)
class AdapterBase:
    """The weights that an exported adapter is a change of."""

    title: str
    """For people: a repository of the model hub where the base is published."""
    sha256: str
    """`weight_folders.weights_identity` of its folder; empty for random weights."""
    before: Adapter | None
    """What was trained on that base before this stage began."""


def adapter_base(job: DitJob, started_from: str) -> AdapterBase:
    """What an adapter of this run is, in the end, a change of.

    Weights that a stage trained whole have no adapter of small rank beside them: then they are the
    base, by name.

    Args:
        job: of the run.
        started_from: identity of the initial weights; empty for random ones.
    """
    folder = job.initial_weights
    if folder is None:
        return AdapterBase(f"the random weights of seed {job.seed}", "", None)
    try:
        before = read_adapter(folder)
    except BadInput:
        # None, or one that does not name its base.
        before = None
    if before is not None:
        return AdapterBase(before.about[BASE_TITLE], before.about[BASE_SHA256], before)
    published = job.transformer.card.base_model
    if job.settings.initial_weights == "pretrained":
        return AdapterBase(published or "the weights that training began with", started_from, None)
    which = job.settings.initial_weights.removeprefix("stage1_")
    return AdapterBase(f"this project's dit_stage1 ({which})", started_from, None)


def adapter_about(job: DitJob, base: AdapterBase, weights: str) -> dict[str, str]:
    """Metadata of an exported adapter (ModelSpec, and `ultraflux.` for the base).

    Args:
        job: of the run.
        base: that the adapter changes.
        weights: "raw" or "ema".
    """
    assert job.settings.adapter is not None
    earlier = base.before.about if base.before is not None else {}
    stages = [one for one in (earlier.get(STAGES), job.name) if one]
    about = {
        BACKBONE: job.transformer.backbone,
        BASE_TITLE: base.title,
        BASE_SHA256: base.sha256,
        MISSING: earlier.get(MISSING, "0"),
        STAGES: "+".join(stages),
        "modelspec.title": f"UltraFlux {job.name} {weights}",
        "modelspec.license": job.transformer.card.license_name or job.transformer.card.license,
    }
    trigger = job.settings.adapter.trigger or _only_caption(job)
    if trigger is not None:
        about["modelspec.trigger_phrase"] = trigger
    return about


def _only_caption(job: DitJob) -> str | None:
    """The caption, where all training images have the same one."""
    if job.train_slice is None or "caption_en" not in pq.read_schema(job.train_slice).names:
        return None
    captions = pd.read_parquet(job.train_slice, columns=["caption_en"])["caption_en"].unique()
    return str(captions[0]) if len(captions) == 1 else None


def save_adapted(
    base: Any,
    settings: AdapterSettings,
    factors: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_gb: float,
    card: Card,
    before: Adapter | None,
    about: Mapping[str, str],
    about_whole: Mapping[str, str] | None = None,
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
        before: adapter that is merged into `base` already, and is part of the exported one.
        about: metadata of the exported adapter, before what `about_whole` says of training.
        about_whole: metadata of the merged weights.

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
    change = _change(factors, settings)
    if before is not None:
        change = added(before.change, change)
    # Fused, then the layers taken out again: the folder must load where nobody has peft.
    base.fuse_lora()
    base.unload_lora()
    # As a fresh model has it: frozen is how it was trained, not what it is.
    base.requires_grad_(True)

    def save_alone(aside: Path) -> None:
        shared = ("modelspec.resolution", "modelspec.tags")
        of_training = {name: value for name, value in (about_whole or {}).items() if name in shared}
        write_adapter(Adapter(change, {**of_training, **about}), aside / ADAPTER_FILE)

    save_transformer(
        base,
        base.state_dict(),
        folder,
        max_shard_gb=max_shard_gb,
        card=card,
        about=about_whole,
        beside=save_alone,
    )


def _change(factors: Mapping[str, Tensor], settings: AdapterSettings) -> Change:
    """Trained factors as a change of weights, the scale alpha / rank in the second factor."""
    change = {}
    for name, down in factors.items():
        layer, found, adapter = name.partition(".lora_A.")
        if found:
            up = factors[f"{layer}.lora_B.{adapter}"]
            change[layer] = LowRank(
                down.detach().clone(), up.detach() * (settings.alpha / settings.rank)
            )
    return change


def merged_weights(
    base: Mapping[str, Tensor], settings: AdapterSettings, factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W + (alpha / rank) B A in float64, for the adapted weights of `base` by their names there.

    Args:
        base: weights by name.
        settings: of the adapter.
        factors: trained parameters by their names in the adapted model.
    """
    merged = {}
    for name, down in factors.items():
        layer, found, rest = name.partition(".lora_A.")
        if found:
            up = factors[f"{layer}.lora_B.{rest}"]
            change = settings.alpha / settings.rank * (up.cpu().double() @ down.cpu().double())
            merged[f"{layer}.weight"] = base[f"{layer}.weight"].cpu().double() + change
    return merged
