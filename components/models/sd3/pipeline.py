"""Text to image with SD3: diffusers' StableDiffusion3Pipeline on an F16 latent grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.pipeline import (
    SHIFT,
    batch_size,
    build_scheduler,
    check_image_size,
    one_generator_per_image,
)
from components.models.sd3.text_encoders import SD3_FOLDERS, Sd3TextEncoders
from components.models.sd3.transformer import check_position_table
from components.models.text_encoders import CLIP_CONTEXT


class StableDiffusion3F16Pipeline(StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline for `AutoencoderKLF16`.

    Differences: latents are 8 * stride times smaller than the image, sizes that would be rounded
    or that leave the table of positions are errors, and every image has its own generator.

    Text components may be None when prompt embeddings are passed (with a guidance scale above 1
    also those of the negative prompt).
    """

    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        *SD3_FOLDERS,
    ]

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLF16,
        text_encoder: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer_2: CLIPTokenizer | None,
        text_encoder_3: T5EncoderModel | None,
        tokenizer_3: T5TokenizerFast | None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.vae_scale_factor = int(vae.spatial_compression)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.size_multiple)

    @property
    def size_multiple(self) -> int:
        """Image sizes must be multiples of this: a token is a 2x2 patch of latents."""
        return int(self.patch_size) * int(self.vae_scale_factor)

    @classmethod
    def from_components(
        cls,
        vae: AutoencoderKLF16,
        transformer: SD3Transformer2DModel,
        encoders: Sd3TextEncoders | None = None,
        *,
        shift: float = SHIFT,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> StableDiffusion3F16Pipeline:
        """Assemble a pipeline.

        Args:
            vae: autoencoder.
            transformer: of the autoencoder's latent channels.
            encoders: text components; None if only prompt embeddings will be passed.
            shift: of the static schedule; 3.0 is also SD3's own.
            scheduler: instead of the static schedule.

        Raises:
            ValueError: channels do not fit.
        """
        if transformer.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"transformer: in_channels {transformer.config.in_channels} must be the "
                f"autoencoder's {vae.config.latent_channels} latent channels"
            )
        return cls(
            scheduler=scheduler or build_scheduler(shift),
            vae=vae,
            transformer=transformer,
            **{name: getattr(encoders, name, None) for name in SD3_FOLDERS},
        )

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        **kwargs: Any,
    ) -> Any:
        """Sample images (defaults: Diffusion-4K's 28 steps and guidance scale 7).

        Args:
            prompt: one or B prompts, or None with embeddings.
            height: pixels, a multiple of `size_multiple` (32 for F16).
            width: pixels, likewise.
            prompt_embeds: (B, 77 + T5 tokens, D) joint states.
            pooled_prompt_embeds: (B, P) pooled vectors.
            generator: one per image; a single one is accepted for a single image.
            num_inference_steps: Euler steps.
            guidance_scale: of classifier-free guidance; up to 1: none.
            max_sequence_length: T5 tokens of `prompt`.
            output_type: `pil`, `np`, `pt` or `latent`.
            **kwargs: StableDiffusion3Pipeline's other arguments.

        Returns:
            StableDiffusion3PipelineOutput with `images`.

        Raises:
            ValueError: bad size, generators that do not match the batch, or guidance without
                anything to contrast with.
        """
        check_image_size(height, width, self.size_multiple)
        factor = self.vae_scale_factor
        check_position_table(self.transformer, height // factor, width // factor)
        if prompt_embeds is not None:
            # The negative prompt is embedded to the same length.
            max_sequence_length = prompt_embeds.shape[1] - CLIP_CONTEXT
        if (
            guidance_scale > 1
            and self.text_encoder is None
            and kwargs.get("negative_prompt_embeds") is None
        ):
            raise ValueError(
                f"guidance_scale: {guidance_scale} needs negative_prompt_embeds where there are no "
                "text encoders; 1 does without"
            )
        batch = batch_size(prompt, prompt_embeds) * int(kwargs.get("num_images_per_prompt", 1))
        generators = one_generator_per_image(generator, batch)
        return super().__call__(
            prompt=prompt,
            height=height,
            width=width,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
            **kwargs,
        )
