"""Tiles of a photograph: the few squares of it that decoder post-training cuts its crops from.

A photograph is decoded once. Its long edge is bounded by 16 crop edges: with the paper's 512 px
crops that is 8192 px, so 4K photographs keep their native pixels; with the 128 px crops of the
embedded profile they are reduced to 2048 px, so that a crop shows structure and not only grain.
Squares of `vae.tile_px` are then taken from a grid that is shifted by chance: they never overlap,
and every place of the photograph is about equally likely. Where they lie follows from the image id
alone, so another seed, batch or learning rate finds the tiles that are there.

Raw uint8, because a crop is then one read and one copy (about a millisecond); lossless PNG or WebP
would halve the disk and cost 15 ms of a core for every crop, JPEG would train on its own blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from components.images.arrays import ImageArray
from components.images.decoding import ByteSource, ImageUndecodable, read_rgb

WORKING_EDGE_IN_CROPS = 16
BYTES_PER_PIXEL = 3

Reason = Literal["narrow", "undecodable"]


class Source(ByteSource, Protocol):
    """Where a photograph comes from: a path or an original that is looked up."""

    @property
    def name(self) -> str:
        """For messages."""


@dataclass(frozen=True)
class Photograph:
    """One original (picklable)."""

    image_id: str
    path: Source


@dataclass(frozen=True)
class TileRules:
    """What decides the tiles of a photograph besides its bytes."""

    crop_px: int
    """Edge of the crops; bounds the reduction, and a photograph without room for one is left out.
    """
    tile_px: int
    """Edge of a tile; shorter where the photograph is."""
    tiles_per_photograph: int
    """At most; a photograph with room for fewer has fewer."""
    max_megapixels: float
    """Bound on decoded originals."""

    @property
    def largest_photograph_bytes(self) -> int:
        """What the tiles of one photograph take at most."""
        return self.tiles_per_photograph * self.tile_px**2 * BYTES_PER_PIXEL


@dataclass(frozen=True)
class Place:
    """One tile in the (reduced) photograph, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class LeftOut:
    """A photograph without tiles, and why."""

    image_id: str
    name: str
    kind: Reason
    reason: str


@dataclass(frozen=True)
class CutPhotograph:
    """The tiles of one photograph; travels between processes."""

    image_id: str
    places: tuple[Place, ...]
    records: tuple[bytes, ...]
    """(height, width, 3) uint8 RGB, row-major."""


def working_size(height: int, width: int, crop_px: int) -> tuple[int, int]:
    """(height, width) after the reduction: never enlarged, long edge at most 16 crops."""
    # Never enlarged: interpolated pixels hold nothing that a decoder could learn.
    scale = min(1.0, WORKING_EDGE_IN_CROPS * crop_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def tile_places(image_id: str, height: int, width: int, rules: TileRules) -> tuple[Place, ...]:
    """Where the tiles of a photograph lie; a pure function of the arguments.

    Args:
        image_id: decides which cells of the grid are taken, and how the grid is shifted.
        height: of the reduced photograph.
        width: of the reduced photograph.
        rules: edge and number of tiles.

    Returns:
        at least one place, in reading order, without overlap.
    """
    tile_h, tile_w = min(height, rules.tile_px), min(width, rules.tile_px)
    rows, columns = height // tile_h, width // tile_w
    # Of the image id alone, so that the order of a slice, or a photograph more, moves no tile.
    key = int.from_bytes(hashlib.sha256(f"tiles {image_id}".encode()).digest()[:16], "big")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    # The ends are exclusive: + 1 lets the grid reach the last row.
    top = int(rng.integers(height - rows * tile_h + 1))
    left = int(rng.integers(width - columns * tile_w + 1))
    cells = sorted(rng.permutation(rows * columns)[: rules.tiles_per_photograph].tolist())
    return tuple(
        Place(top + cell // columns * tile_h, left + cell % columns * tile_w, tile_h, tile_w)
        for cell in cells
    )


def cut_photograph(photograph: Photograph, rules: TileRules) -> CutPhotograph | LeftOut:
    """Decode a photograph, reduce it where it is larger than the rules want, and cut its tiles.

    Returns:
        its tiles, or why it has none.
    """

    def left_out(kind: Reason, reason: str) -> LeftOut:
        return LeftOut(photograph.image_id, photograph.path.name, kind, reason)

    try:
        pixels = read_rgb(photograph.path, max_megapixels=rules.max_megapixels).pixels
    except ImageUndecodable as problem:
        return left_out("undecodable", str(problem))
    original_h, original_w = pixels.shape[:2]
    height, width = working_size(original_h, original_w, rules.crop_px)
    if min(height, width) < rules.crop_px:
        return left_out(
            "narrow",
            f"{original_h}x{original_w} is {height}x{width} with a long edge of at most "
            f"{WORKING_EDGE_IN_CROPS} crops; a crop takes {rules.crop_px}",
        )
    if (height, width) != (original_h, original_w):
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
    places = tile_places(photograph.image_id, height, width, rules)
    return CutPhotograph(photograph.image_id, places, _records(pixels, places))


def _records(pixels: ImageArray, places: Sequence[Place]) -> tuple[bytes, ...]:
    return tuple(
        pixels[one.top : one.top + one.height, one.left : one.left + one.width].tobytes()
        for one in places
    )
