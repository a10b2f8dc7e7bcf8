"""Text-to-image pipeline: diffusers' FluxPipeline on an F16 latent grid with explicit extents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

# model_index.json names our classes by module. diffusers resolves such names among the modules
# that are already imported and imports none itself, so these two imports are what makes
# `from_pretrained` find them.
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.text_encoders import TextEncoders
from components.models.transformer import UltraFluxTransformer2DModel

SHIFT = 3.0


def build_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """Sampling schedule of the released script: static shift, sigma = s u / (1 + (s - 1) u)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)


class UltraFluxPipeline(FluxPipeline):
    """FluxPipeline for `AutoencoderKLF16` and `UltraFluxTransformer2DModel`.

    Differences: latents are 8 * stride times smaller than the image, position ids stay float32,
    the transformer is told the token grid, sizes that would be rounded silently are errors, and
    every image has its own generator, so that it does not depend on its batch.

    Text components may be None when prompt embeddings are passed.
    """

    _optional_components: ClassVar[list[str]] = [
        *FluxPipeline._optional_components,
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    ]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLF16,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: T5EncoderModel | None,
        tokenizer_2: T5TokenizerFast | None,
        transformer: UltraFluxTransformer2DModel,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.vae_scale_factor = int(vae.spatial_compression)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.size_multiple)

    @property
    def size_multiple(self) -> int:
        """Image sizes must be multiples of this: a token is a 2x2 block of latents."""
        return 2 * int(self.vae_scale_factor)

    @classmethod
    def from_components(
        cls,
        vae: AutoencoderKLF16,
        transformer: UltraFluxTransformer2DModel,
        encoders: TextEncoders | None = None,
        *,
        shift: float = SHIFT,
    ) -> UltraFluxPipeline:
        """Assemble a pipeline.

        Args:
            vae: autoencoder.
            transformer: its in_channels must be 4 times the autoencoder's latent channels.
            encoders: text components; None if only prompt embeddings will be passed.
            shift: of the schedule.

        Raises:
            ValueError: channels do not fit.
        """
        if transformer.config.in_channels != 4 * vae.config.latent_channels:
            raise ValueError(
                f"transformer: in_channels {transformer.config.in_channels} must be 4 times the "
                f"autoencoder's {vae.config.latent_channels} latent channels"
            )
        return cls(
            scheduler=build_scheduler(shift),
            vae=vae,
            transformer=transformer,
            text_encoder=encoders.text_encoder if encoders else None,
            tokenizer=encoders.tokenizer if encoders else None,
            text_encoder_2=encoders.text_encoder_2 if encoders else None,
            tokenizer_2=encoders.tokenizer_2 if encoders else None,
        )

    @staticmethod
    def _prepare_latent_image_ids(
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        # Stock ids take the embeddings' dtype; bfloat16 is exact only to 256.
        ids: Tensor = FluxPipeline._prepare_latent_image_ids(
            batch_size, height, width, device, torch.float32
        )
        return ids

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        **kwargs: Any,
    ) -> Any:
        """Sample images.

        Args:
            prompt: one or B prompts, or None with embeddings.
            height: pixels, a multiple of `size_multiple` (32 for F16).
            width: pixels, likewise.
            prompt_embeds: (B, L, D) T5 embeddings.
            pooled_prompt_embeds: (B, P) CLIP embeddings.
            generator: one per image; a single one is accepted for a single image.
            latents: (B, N, 4 C) packed noise instead of drawn noise.
            num_inference_steps: Euler steps.
            guidance_scale: input of the guidance embedding.
            max_sequence_length: T5 tokens of `prompt`.
            output_type: `pil`, `np`, `pt` or `latent`.
            **kwargs: FluxPipeline's other arguments.

        Returns:
            FluxPipelineOutput with `images`.

        Raises:
            ValueError: bad size, or generators that do not match the batch.
        """
        for name, size in (("height", height), ("width", width)):
            if size < self.size_multiple or size % self.size_multiple:
                raise ValueError(
                    f"{name}: must be a positive multiple of {self.size_multiple}, got {size}"
                )
        batch = _batch_size(prompt, prompt_embeds) * int(kwargs.get("num_images_per_prompt", 1))
        generators = _one_generator_per_image(generator, batch)
        grid = (height // self.size_multiple, width // self.size_multiple)
        with self.transformer.grid_context(*grid):
            return super().__call__(
                prompt=prompt,
                height=height,
                width=width,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                generator=generators,
                latents=latents,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                max_sequence_length=max_sequence_length,
                output_type=output_type,
                **kwargs,
            )


def _batch_size(prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
    if prompt_embeds is not None:
        return int(prompt_embeds.shape[0])
    return len(prompt) if isinstance(prompt, list) else 1


def _one_generator_per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator] | None:
    if generator is None:
        return None
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(
            f"generator: expected one per image, {batch}, got {len(generators)}; a shared one "
            "would make each image depend on its batch"
        )
    return generators
