"""What the rest of the project asks of an architecture: the one class that a new one fills in.

Training, sampling, planning, model cards and commands know latents (B, C, h, w), noise levels and
two text tensors. How a transformer takes them (packed or not, with which scale of t, with a
guidance input), where its weights come from and which text encoders belong to it is said here.

No torch on import: commands and the settings read the registry of backbones. Whatever needs torch
or diffusers is imported inside the method that uses it.

Shape legend: B samples, C latent channels, h and w latent pixels (even), L text tokens, D and P
widths of the text states and of the pooled text vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from components.files.install_hints import download_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from components.settings.models import TransformerSettings
    from components.settings.section import Section

Shapes = dict[str, tuple[int, ...]]
"""Tensors by name; -1 for sizes that are free."""


@dataclass(frozen=True)
class TextFamily:
    """How a backbone's text becomes (states (B, L, D), pooled vectors (B, P))."""

    folders: tuple[str, ...]
    """Parts of the layout, tokenizers first; also the attributes of loaded encoders."""
    negative_prompt: str | None
    """What classifier-free guidance contrasts a prompt with; None: guidance is an input of the
    transformer."""
    build_tiny: Callable[..., Any]
    load: Callable[..., Any]
    encode: Callable[..., Any]
    own_part: str | None = None
    """The part, as a folder and as an attribute, that only this family has; None: this is the
    family to fall back on when no other fits."""

    def models(self, encoders: Any) -> list[Any]:
        """The networks among loaded encoders."""
        # Tokenizers stand in the same layout and take no memory on a device.
        return [getattr(encoders, name) for name in self.folders if "tokenizer" not in name]


class Backbone(ABC):
    """One architecture."""

    name: ClassVar[str]
    """Value of `models.transformer.backbone`."""
    title: ClassVar[str]
    """Its name in messages and pages."""
    settings: ClassVar[type[Section] | None] = None
    """Class of the section `models.transformer.NAME`; None: it has none of its own."""
    config_key: ClassVar[str]
    """Configuration entry that its models have and those of no other backbone."""
    folder_classes: ClassVar[tuple[str, ...]]
    """Classes named in the config.json of folders that it loads."""
    takes_image: ClassVar[bool] = False
    """Whether its pipeline can start from an image."""

    # Its published weights, for download commands and for plans where no folder is here.
    repository: ClassVar[str]
    """Hub repository with the folders transformer, tokenizer, text_encoder and so on."""
    weights_folder: ClassVar[str]
    """Where the download commands put it, below `weights/`."""
    published_name: ClassVar[str]
    """What plans call that model."""
    published_config: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Its transformer/config.json, as far as a plan needs it."""
    t5_part: ClassVar[str] = "text_encoder_2"
    """Folder of T5; `text_encoder` is a CLIP."""
    further_clips: ClassVar[tuple[Mapping[str, int], ...]] = ()
    """Published config.json entries of every CLIP after the first. Where there are any, all CLIPs
    project their pooled states, and the pooled vector is theirs in a row."""
    clip_positions: ClassVar[int] = 0
    """Positions of CLIP states that stand before T5's among the L text tokens."""

    def download(self, part: str) -> str:
        """The shell command that gets the weights of `part`, such as transformer."""
        return download_command(
            self.repository, f"weights/{self.weights_folder}", include=(f"{part}/*",)
        )

    @abstractmethod
    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random small transformer in the true architecture, float32.

        Args:
            settings: its shape.
            widths: (D, P) of the text store.
            latent_channels: C of the latent store.
            seed: of the weights.
        """

    @abstractmethod
    def load(self, folder: Path, settings: TransformerSettings) -> Any:
        """Transformer of a local diffusers folder as training starts from it, float32.

        Raises:
            WeightsMissing: there is no model.
            WeightsBroken: unreadable files, or tensors missing, unknown or misshapen.
            ValueError: the folder holds another class.
        """

    @abstractmethod
    def load_released(self, path: Path, *, dtype: torch.dtype, rope_variant: Any) -> Any:
        """Transformer for sampling, from a folder or file as it was published or exported.

        Args:
            path: folder, or a file where the backbone reads one.
            dtype: of the weights.
            rope_variant: of rotary positions instead of the configuration's; None: that one.

        Returns:
            Model in evaluation mode on the CPU.

        Raises:
            WeightsMissing: a file is not there.
            WeightsBroken: unreadable files, or tensors missing, unknown or misshapen; names them.
            ValueError: the folder holds another class, or has no positions to vary.
        """

    @abstractmethod
    def text_family(self) -> TextFamily:
        """Its text encoders: always the same object."""

    @abstractmethod
    def pipeline_class(self) -> Any:
        """Subclass of `components.models.f16_pipeline.F16Pipeline`."""

    @abstractmethod
    def predict(
        self,
        transformer: Any,
        noised: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        *,
        guidance_scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Velocity of noised latents.

        Args:
            transformer: model, or an engine around it.
            noised: (B, C, h, w).
            t: (B,) float32 noise levels in [0, 1].
            text: (B, L, D) text states.
            pooled: (B, P) pooled text vectors.
            guidance_scale: input of the guidance embedding; ignored by models that have none.
            dtype: of the transformer's inputs (its weights' dtype); t stays float32.

        Returns:
            (B, C, h, w) float32.
        """

    @abstractmethod
    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P) that the transformer is made for."""

    @abstractmethod
    def tensor_shapes(self, config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
        """(inputs, outputs) of its forward pass by name, from a folder's config.json."""

    @abstractmethod
    def usage(self, config: Mapping[str, Any]) -> str:
        """How a model card says that exported weights are loaded: Markdown sentences.

        Args:
            config: of the exported transformer.
        """

    def check_size(self, transformer: Any, height: int, width: int) -> None:
        """Refuse latents of height x width that the transformer cannot place.

        Raises:
            ValueError: an edge is odd, or beyond the position table.
        """
        # Asked before training: an odd edge leaves half a patch, and the first such batch would
        # stop a run that had long begun.
        del transformer
        check_even(height, width)

    def from_config(self, config: Mapping[str, Any], latent_hw: tuple[int, int]) -> Any:
        """A transformer of a published configuration, for counting on the meta device.

        Args:
            config: diffusers configuration.
            latent_hw: (h, w) that it must be able to place, whatever its position table holds.

        Raises:
            ValueError: the backbone's plans do not come this way.
        """
        # Backbones with a closed form (Flux) are planned from it and need no model.
        del latent_hw
        raise ValueError(
            f"models.transformer.backbone {self.name}: no plan for the configuration of "
            f"{config.get('_class_name', self.published_name)}"
        )

    def blocks(self, transformer: Any) -> tuple[int, int]:
        """(number of alike blocks, width of the tokens between them), for activation memory."""
        # For networks with blocks of one kind; Flux, which has two, counts both.
        model = bare_model(transformer)
        return len(model.transformer_blocks), int(model.inner_dim)


def bare_model(transformer: Any) -> Any:
    """The model itself: engines keep it in `module`, and their own settings in `config`."""
    return getattr(transformer, "module", transformer)


def check_even(height: int, width: int) -> None:
    """Latents are taken in 2x2 patches.

    Raises:
        ValueError: an edge is odd.
    """
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height}x{width}: the transformer needs even edges")
