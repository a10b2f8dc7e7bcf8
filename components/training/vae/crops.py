"""Crops for decoder post-training: which pixels a step sees is a pure function.

`crop_at(seed, step, index)` names the photograph, the corner and the flip of every crop, so a
resumed run and a run on another number of processes see the same data without any saved state.

Photographs are decoded once into working copies, raw uint8 files that are memory-mapped, so a
crop costs a few page reads. The long edge is bounded by 16 crop edges: with the paper's 512 px
crops that is 8192 px, so 4K photographs keep their native pixels; with the 128 px crops of the
embedded profile they are reduced to 2048 px, so that a crop shows structure and not only grain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from components.files.whole_files import whole_file
from components.images.arrays import ImageArray
from components.images.decoding import MAX_MEGAPIXELS, ImageUndecodable, read_rgb
from components.images.original_lookup import Original
from components.images.pixel_range import to_model
from components.telemetry.progress import track

WORKING_EDGE_IN_CROPS = 16
# First entry of the random key: training and held-out crops never share a stream.
_TRAINING, _HELD_OUT = 0, 1


@dataclass(frozen=True)
class Photograph:
    """One original."""

    image_id: str
    path: Path | Original


@dataclass(frozen=True)
class Crop:
    """Where a crop comes from."""

    photograph: int
    """Position in the list of photographs."""
    top: int
    left: int
    flip: bool


class PhotographTooSmall(ValueError):
    """A photograph whose working copy does not hold one crop."""


def working_size(height: int, width: int, crop_px: int) -> tuple[int, int]:
    """(height, width) of the working copy: never enlarged, long edge at most 16 crops."""
    # Never enlarged: interpolated pixels hold nothing that a decoder could learn.
    scale = min(1.0, WORKING_EDGE_IN_CROPS * crop_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class WorkingCopies:
    """Memory-mapped uint8 RGB arrays of photographs, made when missing."""

    def __init__(
        self,
        photographs: Sequence[Photograph],
        crop_px: int,
        folder: Path,
        *,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        """Decode what is not there yet.

        Args:
            photographs: originals, in the order that `Crop.photograph` counts.
            crop_px: edge of the crops.
            folder: where the copies are kept; a later start reuses them.
            max_megapixels: bound on decoded originals.

        Raises:
            ValueError: no photographs.
            ImageUndecodable: an original cannot be read.
            PhotographTooSmall: an edge of a working copy is below `crop_px`.
        """
        if not photographs:
            raise ValueError("no photographs to cut crops from")
        folder.mkdir(parents=True, exist_ok=True)
        self.crop_px = crop_px
        self.arrays = [
            _working_copy(photograph, crop_px, folder, max_megapixels)
            for photograph in track(photographs, "photographs")
        ]

    def cut(self, crop: Crop) -> ImageArray:
        """(crop_px, crop_px, 3) uint8 of one crop."""
        array = self.arrays[crop.photograph]
        edge = self.crop_px
        pixels = array[crop.top : crop.top + edge, crop.left : crop.left + edge]
        # Contiguous, because torch takes no negative strides.
        return np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)

    def crop_at(self, seed: int, step: int, index: int) -> Crop:
        """Training crop `index` of the global batch of `step`: uniform over photograph and place.

        A pure function of its arguments and of the sizes of the photographs.
        """
        return self._crop((_TRAINING, seed, step, index), None)

    def held_out_crop(self, seed: int, index: int) -> Crop:
        """Fixed crop `index`: photographs in turn, uniform place, never flipped."""
        # No step in the key: the crops are the same at every measurement.
        return self._crop((_HELD_OUT, seed, index), index % len(self.arrays))

    def batch(self, seed: int, step: int, indices: Sequence[int]) -> Tensor:
        """Training crops as (B, 3, crop_px, crop_px) float32 in [-1, 1]."""
        return to_model([self.cut(self.crop_at(seed, step, index)) for index in indices])

    def held_out(self, seed: int, count: int) -> list[ImageArray]:
        """The first `count` fixed crops, (crop_px, crop_px, 3) uint8."""
        return [self.cut(self.held_out_crop(seed, index)) for index in range(count)]

    def _crop(self, key: tuple[int, ...], photograph: int | None) -> Crop:
        # Philox with a hashed key: independent streams without a sequence to step through.
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        if photograph is None:
            photograph = int(rng.integers(len(self.arrays)))
        # The draws stand in a fixed order: photograph, top, left, flip.
        height, width = self.arrays[photograph].shape[:2]
        # The end is exclusive: + 1 lets a crop reach the last row.
        top = int(rng.integers(height - self.crop_px + 1))
        left = int(rng.integers(width - self.crop_px + 1))
        return Crop(photograph, top, left, flip=key[0] == _TRAINING and bool(rng.integers(2)))


def _working_copy(
    photograph: Photograph, crop_px: int, folder: Path, max_megapixels: float
) -> ImageArray:
    # The bound is part of the name: with another crop size the reduction is another.
    path = folder / f"{photograph.image_id}-{WORKING_EDGE_IN_CROPS * crop_px}.npy"
    if not path.exists():
        try:
            pixels = read_rgb(photograph.path, max_megapixels=max_megapixels).pixels
        except ImageUndecodable as problem:
            raise ImageUndecodable(f"{photograph.path.name}: {problem}") from problem
        height, width = working_size(pixels.shape[0], pixels.shape[1], crop_px)
        if (height, width) != pixels.shape[:2]:
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
        # Ranks of several nodes may share the folder and come here at once.
        with whole_file(path, contended=True) as temporary, temporary.open("wb") as file:
            np.save(file, pixels)
    # Mapped, so that ranks of a machine share one copy in the page cache.
    array: ImageArray = np.load(path, mmap_mode="r")
    if min(array.shape[:2]) < crop_px:
        raise PhotographTooSmall(
            f"{photograph.path.name}: {array.shape[0]}x{array.shape[1]} after reduction, but "
            f"vae.crop_px is {crop_px}; choose smaller crops or drop the photograph"
        )
    return array
