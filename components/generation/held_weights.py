"""In how many bits, and where, the networks that sample keep their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from components.settings.models import Quantisation

if TYPE_CHECKING:
    from components.models.loading.memory_modes import MemoryModes
    from components.models.loading.released import ModelSources


class Sampler(Protocol):
    """What is read of `sampling.SamplerSettings`."""

    @property
    def dtype(self) -> str:
        """Name of the type in which networks compute."""

    @property
    def quantisation(self) -> Quantisation:
        """Of the transformer's blocks."""

    @property
    def text_quantisation(self) -> Quantisation:
        """Of the text encoders' blocks."""


def round_pipeline(pipeline: Any, sampler: Sampler, dtype: Any, device: str) -> None:
    """Round the networks of a pipeline, or of text encoders alone, as the sampler says.

    Args:
        pipeline: with a transformer, with text encoders, or with both.
        sampler: says how.
        dtype: in which they compute.
        device: where rounded layers go.

    Raises:
        QuantisationUnavailable: the library is not installed.
    """
    from components.models.backbones import family_of
    from components.models.loading.quantisation import quantise

    transformer = getattr(pipeline, "transformer", None)
    if transformer is not None:
        quantise(transformer, sampler.quantisation, dtype=dtype, device=device)
    for model in family_of(pipeline).models(pipeline):
        # None: they came first, and are gone.
        if model is not None:
            setting = "models.text_encoders.quantisation"
            quantise(model, sampler.text_quantisation, dtype=dtype, device=device, setting=setting)


def encoder_loader(
    sources: ModelSources, sampler: Sampler, *, device: str, memory: MemoryModes
) -> Callable[[], Any]:
    """What loads text encoders that come first, where they are dropped before all else is loaded.

    Args:
        sources: the parts.
        sampler: its dtype and rounding are read.
        device: where they run if they are rounded or offloaded; else the CPU.
        memory: with offloading their layers come to the device one by one.
    """

    def load() -> Any:
        import torch

        from components.models.backbones import family_in
        from components.models.loading.block_offload import offload_layers

        family, dtype = family_in(sources.text_encoders), getattr(torch, sampler.dtype)
        encoders = family.load(sources.text_encoders, dtype=dtype)
        if sampler.text_quantisation != "none":
            round_pipeline(encoders, sampler, dtype, device)
            for model in family.models(encoders):
                model.to(device)
        elif memory.offload == "block":
            for model in family.models(encoders):
                offload_layers(model, device)
        return encoders

    return load
