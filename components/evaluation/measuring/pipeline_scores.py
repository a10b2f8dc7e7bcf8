"""What the pipeline's own evaluation measures: reconstructions, photographs, generated images.

Pictures that were measured before, by the same protocols, are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from components.evaluation.measuring.ledger import Ledger
from components.evaluation.measuring.measured_once import MeasuredOnce, Values, recipe_digest
from components.evaluation.measuring.reconstruction import (
    FIDELITY_IDS,
    fidelity_metrics,
    reconstruct,
)
from components.evaluation.statistics import scores
from components.files.weight_folders import file_digest
from components.generation.generation_list import read_generations
from components.images.arrays import ImageArray
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import SEEN, read_rgb
from components.images.original_lookup import Original, OriginalLookup
from components.metrics.catalog.lattice import LATTICE
from components.metrics.native.lattice import lattice_levels
from components.metrics.native.texture import TEXTURE_IDS, texture_metrics
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import autoencoder_digest, load_base_autoencoder
from components.settings.schema import Settings
from components.telemetry.progress import track

LEDGER = Path("runs", "ledger")
"""Shared with `ultraflux evaluate`; a cache of measurements, not an output of the stage."""
HELD_OUT = Path("data", "slices", "eval.parquet")
AUTOENCODER = Path("data", "vae", "autoencoder")
GENERATIONS = Path("data", "generate", "generations.jsonl")
GENERATED_IMAGES = Path("data", "generate", "images")
LATTICE_IDS = tuple(one.id for one in LATTICE.cards)


def pipeline_scores(root: Path, settings: Settings) -> pd.DataFrame:
    """Every score of the pipeline's results below `data/`, as `scores.scores_table` orders them.

    Args:
        root: repository root; the ledger below `runs/` is read and extended.
        settings: all settings.

    Raises:
        FileNotFoundError: a stage before this one has not run.
        OriginalsMissing: held-out photographs are neither at their path nor in the image store.
    """
    held_out = pd.read_parquet(root / HELD_OUT)
    return scores.scores_table(
        [
            *photograph_scores(root, settings, held_out),
            *generated_scores(root, lattice=settings.evaluate.lattice),
        ]
    )


def _fitted_digest(image_id: str, size: tuple[int, int]) -> str:
    """Stands for a photograph that was cut to (height, width)."""
    return recipe_digest(f"fitted/v2, {SEEN}", image_id, *size)


class _Photograph:
    """One held-out photograph, decoded when a number of it is missing."""

    def __init__(self, original: Original, max_megapixels: float) -> None:
        self._original = original
        self._max_megapixels = max_megapixels

    @cached_property
    def _image(self) -> Image.Image:
        return Image.fromarray(read_rgb(self._original, max_megapixels=self._max_megapixels).pixels)

    def fitted(self, size: tuple[int, int]) -> ImageArray:
        """Resized to cover (height, width) and cropped as in training."""
        return np.asarray(fit_to_bucket(self._image, Bucket(*size)))

    def texture(self, size: tuple[int, int]) -> Values:
        """Its weight-free numbers at a size."""
        return texture_metrics(self.fitted(size))

    def reconstruction(self, autoencoder: AutoencoderKLF16, size: tuple[int, int]) -> Values:
        """Fidelity of an autoencoder's reconstruction at a size."""
        reference = self.fitted(size)
        return fidelity_metrics(reference, reconstruct(autoencoder, reference))


def _autoencoders(root: Path, settings: Settings) -> list[tuple[str, AutoencoderKLF16, str]]:
    """(system, autoencoder on its device, digest) before and after post-training."""
    device = settings.runtime.device
    before: AutoencoderKLF16 = load_base_autoencoder(
        settings.models.autoencoder, settings.project.seed, root
    ).to(device)
    after = AutoencoderKLF16.from_pretrained(root / AUTOENCODER, local_files_only=True)
    after = after.to(device).eval()
    systems = ((scores.RECONSTRUCTION_BEFORE, before), (scores.RECONSTRUCTION_AFTER, after))
    # The device belongs to the identity: its order of summation decides an 8-bit level here and
    # there, so numbers of a CPU must not stand for those of a GPU.
    return [
        (name, model, recipe_digest("autoencoder/v1", autoencoder_digest(model), device))
        for name, model in systems
    ]


def photograph_scores(
    root: Path, settings: Settings, held_out: pd.DataFrame
) -> Iterator[scores.Score]:
    """Reconstructions at bucket size, and photographs at the generated sizes for reference.

    Args:
        root: repository root.
        settings: all settings.
        held_out: rows of `data/slices/eval.parquet`.

    Raises:
        OriginalsMissing: some photographs exist nowhere.
    """
    originals = OriginalLookup(root).find_all(held_out)
    systems = _autoencoders(root, settings)
    buckets = list(zip(held_out["bucket_height"], held_out["bucket_width"], strict=True))
    # Per photograph: size, and (image, reference) of every system's reconstruction.
    reconstructed = []
    for original, (height, width) in zip(originals, buckets, strict=True):
        size = (int(height), int(width))
        reference = _fitted_digest(original.image_id, size)
        pairs = [(recipe_digest("reconstruction/v1", d, reference), reference) for *_, d in systems]
        reconstructed.append((size, pairs))
    del reconstructed[settings.evaluate.reconstruction_images :]
    sizes = settings.generate.sizes
    photographs = [(_fitted_digest(o.image_id, size), "") for o in originals for size in sizes]
    known = [*(pair for _, pairs in reconstructed for pair in pairs), *photographs]
    once = MeasuredOnce(Ledger(root / LEDGER), known, (*FIDELITY_IDS, *TEXTURE_IDS))
    for index, original in enumerate(track(originals, "evaluate photographs")):
        photograph, name = _Photograph(original, settings.ingest.max_megapixels), original.image_id
        if index < len(reconstructed):
            size, pairs = reconstructed[index]
            for (system, autoencoder, _), (image, reference) in zip(systems, pairs, strict=True):
                measure = partial(photograph.reconstruction, autoencoder, size)
                values = once.values(image, FIDELITY_IDS, measure, reference=reference)
                yield from scores.image_scores(name, system, size, values)
        for size in sizes:
            measure = partial(photograph.texture, size)
            values = once.values(_fitted_digest(name, size), TEXTURE_IDS, measure)
            yield from scores.image_scores(name, scores.PHOTOGRAPHS, size, values)
    once.close()


def generated_scores(root: Path, *, lattice: bool = False) -> Iterator[scores.Score]:
    """Weight-free numbers of every generated image, with its prompt.

    Args:
        root: repository root.
        lattice: periodic patterns too (`evaluate.lattice`).
    """
    records = read_generations(root / GENERATIONS)
    folder = root / GENERATED_IMAGES
    digests = [file_digest(folder / record["file"]) for record in records]
    groups = [(TEXTURE_IDS, texture_metrics), *([(LATTICE_IDS, lattice_levels)] * lattice)]
    ids = [metric_id for several, _ in groups for metric_id in several]
    once = MeasuredOnce(Ledger(root / LEDGER), ((digest, "") for digest in digests), ids)
    for record, digest in zip(track(records, "evaluate images"), digests, strict=True):
        size = (int(record["height"]), int(record["width"]))
        for several, measure in groups:
            of_file = partial(_of_file, measure, folder / record["file"])
            values = once.values(digest, several, of_file)
            yield from scores.image_scores(
                record["file"], scores.GENERATED, size, values, record["prompt"]
            )
    once.close()


def _of_file(measure: Callable[[ImageArray], Values], path: Path) -> Values:
    with Image.open(path) as image:
        return measure(np.asarray(image.convert("RGB")))
