"""Text and image to image: diffusers' FluxPipeline on an F16 latent grid with explicit extents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

# model_index.json names our classes by module. diffusers resolves such names among the modules
# that are already imported and imports none itself, so these two imports are what makes
# `from_pretrained` find them.
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.f16_pipeline import F16Pipeline
from components.models.text_encoders import FOLDERS
from components.models.transformer import UltraFluxTransformer2DModel


def remaining_steps(num_inference_steps: int, strength: float) -> int:
    """Steps that image-to-image takes: the last ceil(steps * strength) of the schedule."""
    # The tolerance undoes rounding: 50 * 0.14 is a little more than 7.
    return min(num_inference_steps, math.ceil(num_inference_steps * strength - 1e-9))


class UltraFluxPipeline(F16Pipeline, FluxPipeline):
    """FluxPipeline for `AutoencoderKLF16` and `UltraFluxTransformer2DModel`.

    Differences: those of `F16Pipeline`, position ids stay float32, and the transformer is told the
    token grid.

    Image-to-image runs in the same loop. Deviation from diffusers' FluxImg2ImgPipeline: the image's
    latents are the posterior's mode, so that the generator draws the same noise as for text alone
    (strength 1 equals text-to-image) and strength 0 is the autoencoder's reconstruction (tested).

    Text components may be None when prompt embeddings are passed.
    """

    # Optional for diffusers: None is saved and loads again as None.
    _optional_components: ClassVar[list[str]] = [
        *FluxPipeline._optional_components,
        *FOLDERS,
    ]
    text_parts: ClassVar[tuple[str, ...]] = FOLDERS
    channels_per_latent: ClassVar[int] = 4

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
        # After the constructor, which sets its own grid of 8 px.
        self._take_grid(vae)

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
        image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
        strength: float = 1.0,
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
            image: starting image of exactly this size, one for all or one each (a tensor: (1 or B,
                3, H, W) in [0, 1]); None: text-to-image.
            strength: of image-to-image, 0 (keep the image) to 1 (forget it).
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
            ValueError: bad size or strength, a starting image of another size, or generators that
                do not match the batch.
        """
        # Counted with the batch: each picture of a prompt needs a generator of its own.
        repeats = int(kwargs.get("num_images_per_prompt", 1))
        batch, generators = self._checked(height, width, prompt, prompt_embeds, repeats, generator)
        grid = (height // self.size_multiple, width // self.size_multiple)
        if image is not None:
            if latents is not None:
                raise ValueError("latents: cannot be given beside image")
            clean = self._image_latents(image, height, width, batch)
            steps = remaining_steps(num_inference_steps, _checked_strength(strength))
            # Strength 0 is no call of the loop, which would want at least one step.
            if steps == 0:
                return self._finish(clean, output_type)
            # The whole schedule is laid out and its head cut off: a strength changes where sampling
            # starts, never the noise levels that it passes.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)[-steps:]
            latents = self._noised(clean, generators, grid, sigmas)
            kwargs |= {"sigmas": sigmas.tolist()}
            num_inference_steps = steps
        # FluxPipeline's loop cannot pass `grid_hw`; reading it off the ids is a host copy a step.
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

    @torch.no_grad()
    def _image_latents(self, image: Any, height: int, width: int, batch: int) -> Tensor:
        """Normalised latents (B, C, h, w), float32, of one image or of B images."""
        pixels = self.image_processor.preprocess(image)
        if tuple(pixels.shape[-2:]) != (height, width):
            raise ValueError(
                f"image: is {pixels.shape[-2]}x{pixels.shape[-1]} (height x width), must be "
                f"{height}x{width}"
            )
        if len(pixels) not in (1, batch):
            raise ValueError(f"image: expected 1 or {batch} images, got {len(pixels)}")
        pixels = pixels.to(get_module_execution_device(self.vae), self.vae.dtype)
        # The mode draws nothing, so the generator is where text-to-image would have it.
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        config = self.vae.config
        normal: Tensor = (latents - config.shift_factor) * config.scaling_factor
        return normal.expand(batch, -1, -1, -1)

    def _noised(
        self,
        clean: Tensor,
        generators: list[torch.Generator] | None,
        grid: tuple[int, int],
        sigmas: np.ndarray,
    ) -> Tensor:
        """Packed z_t = (1 - t) z + t noise, (B, N, 4 C), at the first t of the remaining schedule.

        The noise is what text-to-image would draw.
        """
        device, (batch, channels) = self._execution_device, clean.shape[:2]
        height, width = (self.size_multiple * tokens for tokens in grid)
        # In the dtype in which text-to-image draws, since the numbers drawn depend on it.
        noise, _ = self.prepare_latents(
            batch, channels, height, width, self.transformer.dtype, device, generators
        )
        config = self.scheduler.config
        # As FluxPipeline computes it, for the dynamic schedule; the static one ignores mu.
        mu = calculate_shift(
            grid[0] * grid[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        # FluxPipeline sets the same timesteps again; done here first because the mix needs the
        # shifted value of the first one.
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu, device=device)
        t = self.scheduler.sigmas[0].to(device)
        # Mixed as tokens: the noise comes packed from `prepare_latents`.
        packed = self._pack_latents(clean.to(device), *clean.shape)
        # In float32, rounded once: FluxPipeline casts given latents to the embeddings' dtype.
        return (1 - t) * packed + t * noise.float()

    @torch.no_grad()
    def _finish(self, latents: Tensor, output_type: str) -> FluxPipelineOutput:
        """What is left to do when no step is."""
        if output_type == "latent":
            return FluxPipelineOutput(images=self._pack_latents(latents, *latents.shape))
        config = self.vae.config
        # What FluxPipeline does after its last step.
        raw = latents / config.scaling_factor + config.shift_factor
        device = get_module_execution_device(self.vae)
        decoded = self.vae.decode(raw.to(device, self.vae.dtype), return_dict=False)[0]
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(
            images=self.image_processor.postprocess(decoded, output_type=output_type)
        )


def _checked_strength(strength: float) -> float:
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength: must be from 0 to 1, got {strength}")
    return strength
