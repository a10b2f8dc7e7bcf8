"""Crops for decoder post-training: which pixels a step sees is a pure function.

`crop_at(seed, step, index)` names the tile, the corner and the flip of every crop, so a resumed run
and a run on another number of processes see the same data without any saved state.

A crop is cut from a tile that is read as a whole, verified, through a bounded number of open
shards: half a million photographs cost no more descriptors, mappings or memory than ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from components.engine.ordered_pool import EngineLimits
from components.images.arrays import ImageArray
from components.images.decoding import MAX_MEGAPIXELS
from components.images.pixel_range import to_model
from components.training.stores.record_reader import Extents, RecordCorrupt, RecordReader
from components.training.vae.tile_store import SHARD_MIB, make_tiles, read_tiles
from components.training.vae.tiles import BYTES_PER_PIXEL, Photograph, TileRules

__all__ = ["Crop", "Photograph", "TileArrays", "TileCrops", "TilesDamaged", "WorkingCopies"]

# First entry of the random key: training and held-out crops never share a stream.
_TRAINING, _HELD_OUT = 0, 1
_BUFFER_BYTES = 64 * 2**20
"""Tiles that are in memory together, whatever the batch."""


class TilesDamaged(RuntimeError):
    """A tile whose bytes are not the ones that were cut."""


@dataclass(frozen=True)
class Crop:
    """Where a crop comes from."""

    photograph: int
    """Number among the photographs that have tiles."""
    tile: int
    """Row of the index."""
    top: int
    """In the tile."""
    left: int
    flip: bool


class TileCrops:
    """Crops from the tiles of a finished store."""

    def __init__(self, store: Path) -> None:
        """Open it; no shard is read yet.

        Args:
            store: folder, as of `make_tiles`.

        Raises:
            FileNotFoundError: the store is not finished.
        """
        index, rules, self.left_out = read_tiles(store)
        self.store, self.crop_px = store, int(rules["crop_px"])
        self._sizes = index[["height", "width"]].to_numpy(np.int64)
        # Where the tiles of each photograph begin, and where the last ones end.
        starts = np.flatnonzero(np.diff(index["photograph"].to_numpy(np.int64), prepend=-1))
        self._bounds = np.append(starts, len(index))
        self._reader = RecordReader(store, Extents.of(index))

    def __len__(self) -> int:
        """Number of photographs that have tiles."""
        return len(self._bounds) - 1

    @property
    def arrays(self) -> TileArrays:
        """The tiles of every photograph."""
        return TileArrays(self)

    def tiles_of(self, photograph: int) -> range:
        """Rows of the tiles of a photograph."""
        return range(int(self._bounds[photograph]), int(self._bounds[photograph + 1]))

    def tiles(self, rows: Sequence[int]) -> Iterator[tuple[int, ImageArray]]:
        """Tiles of index rows as (place in `rows`, uint8 (height, width, 3)), neighbours together.

        At most 64 MiB of them (at least one tile) are in memory; keep no view of one.

        Raises:
            TilesDamaged: a tile is cut off or its hash differs.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        sizes = self._sizes[chosen].prod(axis=1) * BYTES_PER_PIXEL
        # A narrow photograph has smaller tiles; records that are read together are of one size.
        for nbytes in np.unique(sizes).tolist():
            places = np.flatnonzero(sizes == nbytes)
            at_once = max(1, _BUFFER_BYTES // nbytes)
            buffer = np.empty((min(at_once, len(places)), nbytes), dtype=np.uint8)
            for start in range(0, len(places), at_once):
                part = places[start : start + at_once].tolist()
                self._read([int(chosen[place]) for place in part], buffer[: len(part)])
                for place, record in zip(part, buffer, strict=False):
                    height, width = self._sizes[chosen[place]].tolist()
                    yield place, record.reshape(height, width, BYTES_PER_PIXEL)

    def _read(self, rows: Sequence[int], buffer: ImageArray) -> None:
        try:
            self._reader.read_into(rows, buffer)
        except RecordCorrupt as problem:
            raise TilesDamaged(
                f"{self.store}: shard {problem.shard}: {problem.problem}; delete this folder, the "
                "next run cuts the tiles again"
            ) from None

    def cut(self, crop: Crop) -> ImageArray:
        """(crop_px, crop_px, 3) uint8 of one crop."""
        return self._cut_all([crop])[0]

    def _cut_all(self, crops: Sequence[Crop]) -> list[ImageArray]:
        cut: dict[int, ImageArray] = {}
        edge = self.crop_px
        for place, tile in self.tiles([crop.tile for crop in crops]):
            crop = crops[place]
            pixels = tile[crop.top : crop.top + edge, crop.left : crop.left + edge]
            # Copied: the tile's memory is used again, and torch takes no negative strides.
            cut[place] = np.array(pixels[:, ::-1] if crop.flip else pixels, order="C")
        return [cut[place] for place in range(len(crops))]

    def crop_at(self, seed: int, step: int, index: int) -> Crop:
        """Training crop `index` of the global batch of `step`.

        Uniform over photographs, the tiles of each, and places in the tile; a pure function of its
        arguments and of the table of tiles.
        """
        return self._crop((_TRAINING, seed, step, index), None)

    def held_out_crop(self, seed: int, index: int) -> Crop:
        """Fixed crop `index`: photographs in turn, uniform place, never flipped."""
        # No step in the key: the crops are the same at every measurement.
        return self._crop((_HELD_OUT, seed, index), index % len(self))

    def batch(self, seed: int, step: int, indices: Sequence[int]) -> Tensor:
        """Training crops as (B, 3, crop_px, crop_px) float32 in [-1, 1]."""
        return to_model(self._cut_all([self.crop_at(seed, step, index) for index in indices]))

    def held_out(self, seed: int, count: int) -> list[ImageArray]:
        """The first `count` fixed crops, (crop_px, crop_px, 3) uint8."""
        return self._cut_all([self.held_out_crop(seed, index) for index in range(count)])

    def _crop(self, key: tuple[int, ...], photograph: int | None) -> Crop:
        # Philox with a hashed key: independent streams without a sequence to step through.
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        # The draws stand in a fixed order: photograph, tile, top, left, flip.
        if photograph is None:
            photograph = int(rng.integers(len(self)))
        tiles = self.tiles_of(photograph)
        tile = tiles[int(rng.integers(len(tiles)))]
        height, width = self._sizes[tile].tolist()
        # The end is exclusive: + 1 lets a crop reach the last row.
        top = int(rng.integers(height - self.crop_px + 1))
        left = int(rng.integers(width - self.crop_px + 1))
        return Crop(photograph, tile, top, left, flip=key[0] == _TRAINING and bool(rng.integers(2)))


class TileArrays(Sequence[list[ImageArray]]):
    """The tiles of every photograph as arrays, read when they are asked for."""

    def __init__(self, crops: TileCrops) -> None:
        """Of a store."""
        self._crops = crops

    def __len__(self) -> int:
        """Number of photographs that have tiles."""
        return len(self._crops)

    def __getitem__(self, photograph: int) -> list[ImageArray]:  # type: ignore[override]
        """Its tiles, uint8 (height, width, 3)."""
        if not 0 <= photograph < len(self):
            raise IndexError(photograph)
        read = self._crops.tiles(self._crops.tiles_of(photograph))
        return [tile.copy() for _, tile in sorted(read, key=lambda one: one[0])]


class WorkingCopies(TileCrops):
    """Crops from photographs, whose tiles are cut when they are missing."""

    def __init__(
        self,
        photographs: Sequence[Photograph],
        crop_px: int,
        folder: Path,
        *,
        tile_px: int = 1024,
        tiles_per_photograph: int = 2,
        max_megapixels: float = MAX_MEGAPIXELS,
        max_rejected_fraction: float = 1.0,
        limits: EngineLimits | None = None,
        at_most: int | None = None,
        shard_mib: float = SHARD_MIB,
    ) -> None:
        """Cut what is not there yet; those without room for a crop are listed in `left_out`.

        Args:
            photographs: originals with different ids; their order decides what a number means.
            crop_px: edge of the crops.
            folder: where stores of tiles are kept; a later start reuses them.
            tile_px: see `TileRules`; at least `crop_px` is taken.
            tiles_per_photograph: see `TileRules`.
            max_megapixels: see `TileRules`.
            max_rejected_fraction: see `make_tiles`.
            limits: see `make_tiles`.
            at_most: see `make_tiles`.
            shard_mib: see `make_tiles`.

        Raises:
            ValueError: `NoTiles`: none has room for a crop; or more than `max_rejected_fraction`
                cannot be decoded.
            NoRoomForTiles: see `make_tiles`.
        """
        rules = TileRules(crop_px, max(tile_px, crop_px), tiles_per_photograph, max_megapixels)
        store = make_tiles(
            photographs,
            rules,
            folder,
            limits=limits,
            max_rejected_fraction=max_rejected_fraction,
            at_most=at_most,
            shard_mib=shard_mib,
        )
        super().__init__(store)
