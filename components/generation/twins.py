"""Twins: pictures from the captions of training images, to be laid beside the photographs.

A network that has memorised its few photographs paints them again from their captions. Where it
does, every part between photograph and picture fits to the next; where one is broken, none comes
back. It shows nothing of generalisation.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from components.generation.sampling import (
    Generation,
    GenerationRequest,
    image_seed,
    write_generations,
)
from components.settings.schema import Settings

TRAINED = Path("data", "slices", "stage1.parquet")
TWINS = Path("data", "generate", "twins")
LIST = "twins.jsonl"
_OTHER_SIZES = 3


def twin_requests(root: Path, settings: Settings) -> list[GenerationRequest]:
    """The pictures to make, an image's own size first and then the others.

    Args:
        root: repository root.
        settings: all settings; `generate.twins` says how many training images.

    Raises:
        FileNotFoundError: the table of training images is missing.
    """
    if settings.generate.twins == 0:
        return []
    columns = ["image_id", "caption_en", "bucket_height", "bucket_width"]
    table = pd.read_parquet(root / TRAINED, columns=columns)
    table = table[table["caption_en"].notna() & (table["caption_en"] != "")]
    requests = []
    for number, row in enumerate(table.head(settings.generate.twins).to_dict("records")):
        own = int(row["bucket_height"]), int(row["bucket_width"])
        sizes = [own]
        if number < settings.generate.prompts:
            sizes += least_like(own, settings.generate.sizes)
        requests += [
            GenerationRequest(
                prompt=row["caption_en"],
                # Negative, so that no held-out prompt shares a seed.
                seed=image_seed(settings.generate.seed, -1 - number, height, width),
                height=height,
                width=width,
                name=f"twin{number:02d}_{height}x{width}",
                source_image_id=row["image_id"],
            )
            for height, width in sizes
        ]
    return requests


def least_like(own: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The three of `sizes` whose aspect ratio is furthest from that of `own`, in their order.

    Args:
        own: (height, width).
        sizes: (height, width) each.
    """

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(own[0] / own[1]))

    chosen = sorted(sizes, key=distance, reverse=True)[:_OTHER_SIZES]
    return [size for size in sizes if size in chosen and size != own]


def write_twins(generations: Sequence[Generation], finished: Path, folder: Path) -> Path:
    """Write the pictures and `twins.jsonl` into `folder`; returns it.

    Args:
        generations: of `twin_requests`.
        finished: folder that holds the files.
        folder: made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_generations(generations, finished, folder, folder / LIST)
    return folder
