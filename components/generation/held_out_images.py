"""Images from the captions of held-out photographs, every size, with the models just trained.

Beside them stand the twins of training images (`twins.py`): one loaded model paints both.

images = generate_held_out(root, load_settings(root / "params.yaml"), finished=root / "drafts")
images.write(root / "data" / "generate")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from components.generation import sampling
from components.generation.contact_sheet import contact_sheet
from components.generation.held_weights import encoder_loader
from components.generation.twins import twin_requests, write_twins
from components.models.loading.memory_modes import memory_modes
from components.models.loading.released import source_digests
from components.settings.schema import Settings

HELD_OUT = Path("data", "slices", "eval.parquet")
_CELL_PX = 320


class NoCaptions(ValueError):
    """No held-out image has a caption; one line."""


@dataclass(frozen=True)
class HeldOutImages:
    """Finished images, and what they were made from."""

    generations: list[sampling.Generation]
    """In the order of prompts, then sizes."""
    twins: list[sampling.Generation]
    """From captions of training images."""
    finished: Path
    """Folder that holds the files."""
    prompts: int
    sizes: int
    digests: dict[str, str]
    """Model name to content digest."""

    def write(self, folder: Path) -> dict[str, Path]:
        """Write `images/*.png`, `generations.jsonl`, `grid.png` and `twins/`.

        Args:
            folder: exists; pictures of an earlier run in it go.

        Returns:
            Path by name.
        """
        images = folder / "images"
        images.mkdir(exist_ok=True)
        wanted = {generation.file for generation in self.generations}
        for stale in images.iterdir():
            if stale.name not in wanted:
                stale.unlink()
        log, grid = folder / "generations.jsonl", folder / "grid.png"
        sampling.write_generations(self.generations, self.finished, images, log)
        pictures = [Image.open(images / generation.file) for generation in self.generations]
        contact_sheet(pictures, columns=self.sizes, cell_px=_CELL_PX).save(grid)
        twins = write_twins(self.twins, self.finished, folder / "twins")
        return {"images": images, "generations.jsonl": log, "grid.png": grid, "twins": twins}


def generate_held_out(
    root: Path, settings: Settings, *, finished: Path, description: str = "generate"
) -> HeldOutImages:
    """Make every image that is not finished yet.

    Args:
        root: repository root.
        settings: all settings.
        finished: folder of finished files, each with its key inside, so a killed run goes on
            where it stopped.
        description: for the progress bar.

    Raises:
        FileNotFoundError: the held-out table, or that of training images, is missing.
        NoCaptions: no held-out image has a caption.
        WeightsMissing: a model has not been trained yet.
    """
    prompts = held_out_prompts(root, settings)
    sources = sampling.model_sources(root, settings)
    # Part of the result: another number of threads sums in another order, which moves pixels.
    torch.set_num_threads(settings.runtime.torch_threads)
    sampler = sampling.sampler_settings(settings)
    digests = source_digests(sources, sampler.schedule)
    sizes = settings.generate.sizes
    device, memory = settings.runtime.device, memory_modes(settings.generate.memory)
    memory.check(sampler.quantisation, sampler.text_quantisation)
    encoders = encoder_loader(sources, sampler, device=device, memory=memory)
    held_out = sampling.make_requests(prompts, sizes, settings.generate.seed)
    generations = sampling.generate_images(
        lambda: sampling.load_model(sources, sampler, device=device, memory=memory),
        [*held_out, *twin_requests(root, settings)],
        finished,
        sampler=sampler,
        digests=digests,
        description=description,
        load_encoders=encoders if memory.text_first else None,
    )
    images, twins = generations[: len(held_out)], generations[len(held_out) :]
    return HeldOutImages(images, twins, finished, len(prompts), len(sizes), digests)


def held_out_prompts(root: Path, settings: Settings) -> list[tuple[str, str]]:
    """(image_id, English caption) of the first held-out images.

    Raises:
        FileNotFoundError: the held-out table is missing.
        NoCaptions: no held-out image has a caption.
    """
    table = pd.read_parquet(root / HELD_OUT, columns=["image_id", "caption_en"])
    table = table[table["caption_en"].notna() & (table["caption_en"] != "")]
    chosen = table.head(settings.generate.prompts)
    if chosen.empty:
        raise NoCaptions(
            f"{HELD_OUT.as_posix()} holds no captioned image to take a prompt from; raise "
            "slices.eval_min_images or add photographs"
        )
    return list(zip(chosen["image_id"], chosen["caption_en"], strict=True))
