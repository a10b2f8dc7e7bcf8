"""Pictures at fixed prompts and seeds while training goes on, from the averaged weights.

The prompts are the captions of the first held-out images, at those images' sizes, whose embeddings
are in the text store, and behind them prompts of one's own. Sampling is that of `ultraflux
generate` (the same pipelines). All draws come from generators of their own, so training ends with
the same bytes with and without pictures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from components.files.whole_files import whole_file
from components.generation.contact_sheet import contact_sheet
from components.models.backbones import BACKBONES, backbone_of
from components.models.latent_tokens import unpack_latents
from components.settings.training import SampleSettings
from components.training.distributed.ranks import Ranks
from components.training.dit.curriculum import keyed_generator
from components.training.dit.job import DitJob, StartUnusable
from components.training.dit.validation import LEVELS
from components.training.encoding.own_prompts import prompt_id, read_own_prompts
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import EMPTY_PROMPT_ID, TextStore

if TYPE_CHECKING:
    from components.models.autoencoder_f16 import AutoencoderKLF16

# Training draws at steps from 0 on, validation at -1 - level.
# The first number below both, so no picture begins with noise that a loss has seen.
_STREAM = -1 - LEVELS
# Of the sheet alone: pictures are drawn at their full size and shrunk to compare them.
_CELL_PX = 512
# Longest edge decoded in one piece: above it activations of the decoder would compete with training
# for memory.
_CLEAN_EDGE_PX = 1024


class SampleGrids:
    """The pictures of one run."""

    def __init__(
        self,
        settings: SampleSettings,
        autoencoder: AutoencoderKLF16,
        latents: LatentStore,
        texts: TextStore,
        image_ids: Sequence[str],
        folder: Path,
        *,
        last_step: int,
        seed: int,
        ranks: Ranks,
        own_prompts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Choose the prompts.

        Args:
            settings: how many and how often.
            autoencoder: decodes; on the CPU between grids.
            latents: gives the sizes.
            texts: embeddings of the prompts.
            image_ids: held-out images; the first in order of their ids are used.
            folder: for `step-<number>.png`.
            last_step: of the run; a grid is always drawn there.
            seed: of the noise.
            ranks: this process.
            own_prompts: embeddings of `settings.own_prompts` by `prompt_id`; those without are not
                drawn.

        Raises:
            StartUnusable: a size of one's own that the pipeline would round.
        """
        self._settings, self._autoencoder, self._texts = settings, autoencoder, texts
        # By id: the same prompts in every run on this corpus, whatever the order of the index.
        chosen = sorted(image_ids)[: settings.prompts]
        rows = latents.index.set_index("image_id").loc[chosen, ["latent_h", "latent_w"]]
        # From latent sizes back to pixels: these are sizes that the network is trained on.
        factor = int(autoencoder.spatial_compression)
        sizes = rows.to_numpy() * factor
        self._prompts = [
            (name, int(height), int(width))
            for name, (height, width) in zip(chosen, sizes, strict=True)
        ]
        # Here, because diffusers is most of what importing the trainer would cost.
        from components.models.f16_pipeline import check_image_size

        self._own = dict(own_prompts or {})
        first = self._prompts[0][1:]
        for number, own in enumerate(settings.own_prompts):
            height, width = own.size or first
            try:
                check_image_size(height, width, 2 * factor)
            except ValueError as problem:
                raise StartUnusable(f"samples.own_prompts[{number}].size: {problem}") from None
            if (name := prompt_id(own.prompt)) in self._own:
                self._prompts.append((name, height, width))
        self.folder = folder
        self._last_step, self._seed, self._ranks = last_step, seed, ranks

    def is_due(self, step: int) -> bool:
        """Whether a grid belongs after `step` steps."""
        every = self._settings.every
        if every is None:
            return False
        # 0 means at the end alone.
        return step == self._last_step or (every > 0 and step % every == 0)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture in latent pixels."""
        factor = int(self._autoencoder.spatial_compression)
        return [(height // factor, width // factor) for _, height, width in self._prompts]

    @torch.no_grad()
    def draw(self, transformer: Any, step: int) -> None:
        """Write `step-<number>.png`; collective.

        Prompts are divided over the ranks. Every rank makes the same number of forward passes
        (some for nothing), which weights divided by ZeRO 3 need.

        Args:
            transformer: bare model with the weights to show; left in training mode.
            step: number of steps done.
        """
        transformer.eval()
        count, ranks = len(self._prompts), self._ranks
        # On the device for the grid alone; between grids its memory belongs to training.
        self._autoencoder.to(ranks.device)
        pipeline = self._pipeline(transformer)
        mine = {}
        for turn in range(math.ceil(count / ranks.data_world_size)):
            # A rank without a prompt of its own draws one again; the dictionary keeps one of each.
            number = (turn * ranks.data_world_size + ranks.data_rank) % count
            mine[number] = self._sample(pipeline, *self._prompts[number]).cpu()
        # Latents travel and not pictures: 48 times fewer values, and one rank decodes anyway.
        everyone = {number: z for part in ranks.gather(mine) for number, z in part.items()}
        if ranks.is_first:
            pictures = [self._decode(pipeline, everyone[number]) for number in range(count)]
            self._write(pictures, step)
        self._autoencoder.to("cpu")
        transformer.train()

    def _pipeline(self, transformer: Any) -> Any:
        kind = backbone_of(transformer).pipeline_class()
        pipeline = kind.from_components(self._autoencoder, transformer)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _sample(self, pipeline: Any, name: str, height: int, width: int) -> Tensor:
        """Normalised latents (1, C, h, w) of one prompt, in the transformer's dtype."""
        device, dtype = self._ranks.device, pipeline.transformer.dtype

        def embedding(image_id: str) -> list[Tensor]:
            embedded = self._own.get(image_id) or self._texts.read(image_id)
            return [x[None].to(device, dtype) for x in embedded]

        text, pooled = embedding(name)
        # Guidance without a negative prompt is an input of the network (Flux); the others compare
        # with the empty prompt.
        contrast = {}
        if backbone_of(pipeline.transformer).text_family().negative_prompt is not None:
            names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
            contrast = dict(zip(names, embedding(EMPTY_PROMPT_ID), strict=True))
        latents: Tensor = pipeline(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            height=height,
            width=width,
            num_inference_steps=self._settings.num_inference_steps,
            guidance_scale=self._settings.guidance_scale,
            # Not keyed by the step: the same noise at every grid, so that pictures show training
            # alone.
            generator=keyed_generator(self._seed, _STREAM, name),
            output_type="latent",
            **contrast,
        ).images
        # Some pipelines return packed tokens, others an image of latents.
        if latents.ndim == 3:
            multiple = pipeline.size_multiple
            latents = unpack_latents(latents, height // multiple, width // multiple)
        return latents

    def _decode(self, pipeline: Any, latents: Tensor) -> Image.Image:
        """Picture of normalised latents (1, C, h, w); large ones in tiles, beside the trainer."""
        autoencoder = self._autoencoder
        edge = max(latents.shape[-2:]) * autoencoder.spatial_compression
        autoencoder.use_tiling = edge > _CLEAN_EDGE_PX
        config = autoencoder.config
        # The normalisation is undone in float32 and rounded once, to the decoder's precision.
        raw = latents.to(self._ranks.device, torch.float32)
        raw = raw / config.scaling_factor + config.shift_factor
        decoded = autoencoder.decode(raw.to(autoencoder.dtype), return_dict=False)[0]
        picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture

    def _write(self, pictures: Sequence[Image.Image], step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = math.ceil(math.sqrt(len(pictures)))
        sheet = contact_sheet(pictures, columns=columns, cell_px=_CELL_PX)
        with whole_file(self.folder / f"step-{step:08d}.png") as temporary:
            sheet.save(temporary, format="PNG")


def grids_of_run(
    job: DitJob, latents: LatentStore, texts: TextStore, image_ids: Sequence[str], ranks: Ranks
) -> SampleGrids | None:
    """The pictures of a training run; None where its settings want none.

    Raises:
        WeightsMissing: the autoencoder's folder is not there.
    """
    if job.autoencoder is None or job.settings.samples.every is None:
        return None
    family = BACKBONES[job.transformer.backbone].text_family()
    if family.negative_prompt is not None and EMPTY_PROMPT_ID not in texts:
        if ranks.is_first:
            print(
                f"{job.name}: no sample grids: the text embeddings hold no empty prompt, which "
                f"{job.transformer.backbone} samples against; make them again with `ultraflux "
                "stage run text_embeddings`",
                file=sys.stderr,
            )
        return None
    # diffusers comes with peft, transformers and bitsandbytes: three quarters of what importing the
    # trainer would cost. Only pictures and the transformer itself need it.
    from components.models.loading.base_autoencoder import load_base_autoencoder

    return SampleGrids(
        job.settings.samples,
        load_base_autoencoder(job.autoencoder, job.seed),
        latents,
        texts,
        image_ids,
        job.state_dir / "samples",
        last_step=job.settings.steps,
        seed=job.seed,
        ranks=ranks,
        own_prompts=read_own_prompts(
            [own.prompt for own in job.settings.samples.own_prompts], job.state_dir
        ),
    )
