"""Ways to sample with less memory; which of them change the picture is said at each.

- `text-first`: text encoders are loaded, used and dropped before anything else is loaded (Flux'
  T5 is 9.5 GB in bfloat16). Same picture.
- `model-offload`: one model at a time on the GPU. Same picture.
- `block-offload`: one block of the transformer, one layer of a text encoder at a time on the GPU.
  Same picture.
- `vae-slicing`: a batch is decoded image by image. Same picture.
- `vae-tiling`: overlapping tiles are decoded and blended; an image larger than a tile is close to
  the whole decode, not equal: group norms and attention see a tile each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from components.settings.evaluation import MemoryMode

if TYPE_CHECKING:
    from components.models.f16_pipeline import F16Pipeline

MEMORY_MODES: tuple[str, ...] = get_args(MemoryMode)


@dataclass(frozen=True)
class MemoryModes:
    """What is switched on."""

    text_first: bool = False
    offload: Literal["none", "model", "block"] = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False

    def check(self, *quantisations: str) -> None:
        """Refuse ways to hold weights that do not go together.

        Raises:
            ValueError: offloading of weights in nf4.
        """
        if self.offload == "block" and "nf4" in quantisations:
            raise ValueError(
                "memory: block-offload does not move the scales of weights in nf4; use int8, fp8 "
                "or none, or model-offload"
            )


def parse_memory(text: str) -> MemoryModes:
    """Modes from a list such as "text-first,vae-tiling"; "none" or "" is none of them.

    Raises:
        ValueError: an unknown mode.
    """
    # A set: the order of modes means nothing, and "none" beside others adds nothing.
    return memory_modes(name.strip() for name in text.split(","))


def memory_modes(listed: Iterable[str]) -> MemoryModes:
    """Modes by name; "none" and "" say nothing.

    Raises:
        ValueError: an unknown mode, or two ways to offload.
    """
    names = set(listed) - {"", "none"}
    unknown = sorted(names - set(MEMORY_MODES))
    if unknown:
        raise ValueError(
            f"memory: unknown mode {', '.join(unknown)}; choose from none, "
            f"{', '.join(MEMORY_MODES)} (several: separated by commas)"
        )
    if {"model-offload", "block-offload"} <= names:
        raise ValueError("memory: model-offload and block-offload are two ways; choose one")
    offload: Literal["none", "model", "block"] = "none"
    if "model-offload" in names:
        offload = "model"
    elif "block-offload" in names:
        offload = "block"
    return MemoryModes(
        text_first="text-first" in names,
        offload=offload,
        vae_slicing="vae-slicing" in names,
        vae_tiling="vae-tiling" in names,
    )


def place_pipeline(pipeline: F16Pipeline, modes: MemoryModes, device: str) -> None:
    """Put a pipeline on a device the way the modes ask for.

    Args:
        pipeline: loaded on the CPU.
        modes: `text_first` is the business of whoever loads the pipeline.
        device: such as "cuda" or "cpu".
    """
    # Switches of the autoencoder alone: they may be set before or after it is placed.
    if modes.vae_slicing:
        pipeline.vae.enable_slicing()
    if modes.vae_tiling:
        pipeline.vae.enable_tiling()
    # Offloading places each network itself, just before it runs: moved to the device first, all of
    # them would be there at once, which is what the mode is to avoid.
    if modes.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif modes.offload == "block":
        _offload_by_blocks(pipeline, device)
    else:
        pipeline.to(device)


def _offload_by_blocks(pipeline: F16Pipeline, device: str) -> None:
    from components.models.backbones import family_of
    from components.models.loading.block_offload import offload_blocks, offload_layers

    offload_blocks(pipeline.transformer, device)
    for model in family_of(pipeline).models(pipeline):
        # None where embeddings are passed.
        if model is not None:
            offload_layers(model, device)
    # Small beside a block's own activations.
    pipeline.vae.to(device)
