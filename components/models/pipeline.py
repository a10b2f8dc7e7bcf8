"""Text and image to image: diffusers' FluxPipeline on an F16 latent grid with explicit extents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

# model_index.json names our classes by module. diffusers resolves such names among the modules
# that are already imported and imports none itself, so these two imports are what makes
# `from_pretrained` find them.
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.text_encoders import TextEncoders
from components.models.transformer import UltraFluxTransformer2DModel

SHIFT = 3.0
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
    if schedule == "static":
        return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    return FlowMatchEulerDiscreteScheduler(
        shift=shift,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def remaining_steps(num_inference_steps: int, strength: float) -> int:
    """Steps that image-to-image takes: the last ceil(steps * strength) of the schedule."""
    # The tolerance undoes rounding: 10 * 0.7 is a little more than 7.
    return min(num_inference_steps, math.ceil(num_inference_steps * strength - 1e-9))


class UltraFluxPipeline(FluxPipeline):
    """FluxPipeline for `AutoencoderKLF16` and `UltraFluxTransformer2DModel`.

    Differences: latents are 8 * stride times smaller than the image, position ids stay float32,
    the transformer is told the token grid, sizes that would be rounded silently are errors, and
    every image has its own generator, so that it does not depend on its batch.

    Image-to-image runs in the same loop. Deviation from diffusers' FluxImg2ImgPipeline: the image's
    latents are the posterior's mode, so that the generator draws the same noise as for text alone
    (strength 1 equals text-to-image) and strength 0 is the autoencoder's reconstruction (tested).

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
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> UltraFluxPipeline:
        """Assemble a pipeline.

        Args:
            vae: autoencoder.
            transformer: its in_channels must be 4 times the autoencoder's latent channels.
            encoders: text components; None if only prompt embeddings will be passed.
            shift: of the static schedule.
            scheduler: instead of the static schedule.

        Raises:
            ValueError: channels do not fit.
        """
        if transformer.config.in_channels != 4 * vae.config.latent_channels:
            raise ValueError(
                f"transformer: in_channels {transformer.config.in_channels} must be 4 times the "
                f"autoencoder's {vae.config.latent_channels} latent channels"
            )
        return cls(
            scheduler=scheduler or build_scheduler(shift),
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
        check_image_size(height, width, self.size_multiple)
        batch = batch_size(prompt, prompt_embeds) * int(kwargs.get("num_images_per_prompt", 1))
        generators = one_generator_per_image(generator, batch)
        grid = (height // self.size_multiple, width // self.size_multiple)
        if image is not None:
            if latents is not None:
                raise ValueError("latents: cannot be given beside image")
            clean = self._image_latents(image, height, width, batch)
            steps = remaining_steps(num_inference_steps, _checked(strength))
            if steps == 0:
                return self._finish(clean, output_type)
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)[-steps:]
            latents = self._noised(clean, generators, grid, sigmas)
            kwargs |= {"sigmas": sigmas.tolist()}
            num_inference_steps = steps
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
        noise, _ = self.prepare_latents(
            batch, channels, height, width, self.transformer.dtype, device, generators
        )
        config = self.scheduler.config
        mu = calculate_shift(
            grid[0] * grid[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu, device=device)
        t = self.scheduler.sigmas[0].to(device)
        packed = self._pack_latents(clean.to(device), *clean.shape)
        return (1 - t) * packed + t * noise.float()

    @torch.no_grad()
    def _finish(self, latents: Tensor, output_type: str) -> FluxPipelineOutput:
        """What is left to do when no step is."""
        if output_type == "latent":
            return FluxPipelineOutput(images=self._pack_latents(latents, *latents.shape))
        config = self.vae.config
        raw = latents / config.scaling_factor + config.shift_factor
        device = get_module_execution_device(self.vae)
        decoded = self.vae.decode(raw.to(device, self.vae.dtype), return_dict=False)[0]
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(
            images=self.image_processor.postprocess(decoded, output_type=output_type)
        )


def _checked(strength: float) -> float:
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength: must be from 0 to 1, got {strength}")
    return strength


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
    if generator is None:
        return None
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(
            f"generator: expected one per image, {batch}, got {len(generators)}; a shared one "
            "would make each image depend on its batch"
        )
    return generators
