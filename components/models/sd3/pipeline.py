"""Text to image with SD3: diffusers' StableDiffusion3Pipeline on an F16 latent grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.f16_pipeline import F16Pipeline
from components.models.sd3.text_encoders import SD3_FOLDERS
from components.models.sd3.transformer import check_position_table
from components.models.tiny_tokenizers import CLIP_CONTEXT


class StableDiffusion3F16Pipeline(F16Pipeline, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline for `AutoencoderKLF16`.

    Differences: those of `F16Pipeline`, and sizes that leave the table of positions are errors.

    Text components may be None when prompt embeddings are passed (with a guidance scale above 1
    also those of the negative prompt).
    """

    # Optional for diffusers: None is saved and loads again as None.
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        *SD3_FOLDERS,
    ]
    text_parts: ClassVar[tuple[str, ...]] = SD3_FOLDERS
    # SD3 cuts its 2x2 patches inside the transformer, Flux before it.
    channels_per_latent: ClassVar[int] = 1

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
        # After the constructor, which sets its own grid of 8 px.
        self._take_grid(vae)

    @property
    def size_multiple(self) -> int:
        """Image sizes must be multiples of this: the transformer cuts patches of its own size."""
        return int(self.patch_size) * int(self.vae_scale_factor)

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
        # Counted with the batch: each picture of a prompt needs a generator of its own.
        repeats = int(kwargs.get("num_images_per_prompt", 1))
        _, generators = self._checked(height, width, prompt, prompt_embeds, repeats, generator)
        factor = self.vae_scale_factor
        # Before sampling: diffusers would raise in the first step, after the text was encoded.
        check_position_table(self.transformer, height // factor, width // factor)
        if prompt_embeds is not None:
            # The negative prompt is embedded to the same length.
            max_sequence_length = prompt_embeds.shape[1] - CLIP_CONTEXT
        if (
            # diffusers turns classifier-free guidance on above 1 and would then fail inside the
            # encoder call.
            guidance_scale > 1
            and self.text_encoder is None
            and kwargs.get("negative_prompt_embeds") is None
        ):
            raise ValueError(
                f"guidance_scale: {guidance_scale} needs negative_prompt_embeds where there are no "
                "text encoders; 1 does without"
            )
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
