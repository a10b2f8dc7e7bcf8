"""What the sampling pipelines share: the F16 grid, the schedule, and one generator per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.noise_shift import (
    BASE_MU,
    BASE_TOKENS,
    LARGE_MU,
    LARGE_TOKENS,
    STATIC_SHIFT,
)

# The released script's schedule bit for bit.
SHIFT = STATIC_SHIFT
Schedule: TypeAlias = Literal["static", "dynamic"]


def build_scheduler(
    shift: float = SHIFT, schedule: Schedule = "static"
) -> FlowMatchEulerDiscreteScheduler:
    """Sampling schedule sigma(u) = s u / (1 + (s - 1) u), u from 1 to 1/steps.

    Args:
        shift: s of the static schedule.
        schedule: `static` is the released script's; `dynamic` is stock Flux', where s = exp(mu)
            and mu grows linearly with the number of image tokens, from 0.5 at 256 to 1.15 at 4096
            (and on: 3.23 at the 16,384 tokens of a 4096x4096 image).
    """
    # Nothing but the shift: terminal or Karras variants would change the released noise levels.
    if schedule == "static":
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    return FlowMatchEulerDiscreteScheduler(
        shift=shift,
        # FLUX.1-dev's four numbers; the line goes on beyond 4096 tokens without a cap.
        use_dynamic_shifting=True,
        base_shift=BASE_MU,
        max_shift=LARGE_MU,
        base_image_seq_len=BASE_TOKENS,
        max_image_seq_len=LARGE_TOKENS,
    )


if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as _Mixable
else:
    # A plain mixin: diffusers' own base comes in with the pipeline that it is mixed into.
    _Mixable = object


class F16Pipeline(_Mixable):
    """Mixed into a diffusers pipeline whose autoencoder is `AutoencoderKLF16`.

    Latents are 8 * stride times smaller than the image, sizes that diffusers would round silently
    are errors, and every image has its own generator, so that it does not depend on its batch.
    """

    text_parts: ClassVar[tuple[str, ...]]
    """Names of its text components; all of them may be None when embeddings are passed."""
    channels_per_latent: ClassVar[int]
    """Channels of the transformer's input for each latent channel: 4 where 2x2 blocks are packed
    into tokens before it, 1 where it cuts patches itself."""

    vae: Any
    transformer: Any
    scheduler: Any
    vae_scale_factor: int
    image_processor: Any

    def _take_grid(self, vae: AutoencoderKLF16) -> None:
        """Replace the grid of 8 px that diffusers' constructor derived from the number of levels.

        It counts downsamplers and so misses the stride of the stem.
        """
        self.vae_scale_factor = int(vae.spatial_compression)
        # Its multiple is a token's, not a latent's: else it would let a size through that cannot be
        # packed.
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.size_multiple)

    @property
    def size_multiple(self) -> int:
        """Image sizes must be multiples of this: a token is a 2x2 block of latents."""
        return 2 * int(self.vae_scale_factor)

    @classmethod
    def from_components(
        cls,
        vae: AutoencoderKLF16,
        transformer: Any,
        encoders: Any = None,
        *,
        shift: float = SHIFT,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> Self:
        """Assemble a pipeline.

        Args:
            vae: autoencoder.
            transformer: of the autoencoder's latent channels.
            encoders: text components; None if only prompt embeddings will be passed.
            shift: of the static schedule.
            scheduler: instead of the static schedule.

        Raises:
            ValueError: channels do not fit.
        """
        per_latent, channels = cls.channels_per_latent, vae.config.latent_channels
        # Said here in words: the first matrix product would only name two sizes.
        if transformer.config.in_channels != per_latent * channels:
            times = f"{per_latent} times " if per_latent > 1 else ""
            raise ValueError(
                f"transformer: in_channels {transformer.config.in_channels} must be {times}the "
                f"autoencoder's {channels} latent channels"
            )
        # From any object with these names; missing ones become None, as when embeddings are passed.
        parts = {name: getattr(encoders, name, None) for name in cls.text_parts}
        make: Any = cls
        made: Self = make(
            scheduler=scheduler or build_scheduler(shift),
            vae=vae,
            transformer=transformer,
            **parts,
        )
        return made

    def _checked(
        self,
        height: int,
        width: int,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> tuple[int, list[torch.Generator] | None]:
        """(number of images, a generator for each) of a call.

        Raises:
            ValueError: bad size, or generators that do not match the batch.
        """
        check_image_size(height, width, self.size_multiple)
        batch = batch_size(prompt, prompt_embeds) * images_per_prompt
        return batch, one_generator_per_image(generator, batch)


def check_image_size(height: int, width: int, multiple: int) -> None:
    """Sizes that a pipeline would round are errors.

    Raises:
        ValueError: an edge is not a positive multiple of `multiple` pixels.
    """
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            raise ValueError(f"{name}: must be a positive multiple of {multiple}, got {size}")


def batch_size(prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
    """Number of prompts, whichever way they are given."""
    if prompt_embeds is not None:
        return int(prompt_embeds.shape[0])
    return len(prompt) if isinstance(prompt, list) else 1


def one_generator_per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator] | None:
    """One generator for each image of a batch; None stays None.

    Raises:
        ValueError: another number of generators.
    """
    # diffusers accepts one generator for a batch and draws from it in order, so that a picture
    # would change with its place in the batch.
    if generator is None:
        return None
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(
            f"generator: expected one per image, {batch}, got {len(generators)}; a shared one "
            "would make each image depend on its batch"
        )
    return generators
