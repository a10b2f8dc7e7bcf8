"""Measurements by content: what was measured once is never measured again.

A value belongs to (image, reference, prompt, metric, protocol, weights), all but the metric's name
as digests, so a moved or renamed picture keeps its values and a changed one loses them. Features of
set metrics (what FID and its kin are computed from) are kept the same way.

On disk: `values/` and `features/` hold immutable Parquet parts. Each is written aside, flushed, and
renamed to a name that is a digest of its bytes, so a kill leaves a whole part or none, any number
of processes may append at once, and the same rows appended twice are one file. A key that stands in
two parts must have one value. `compact` merges parts in the order of their keys: the bytes that
remain depend on what was measured and not on when, by whom or in how many runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.files.whole_files import write_bytes

Features = npt.NDArray[np.float32]

_COMPRESSION = "zstd"
SMALL_PART_BYTES = 64 * 2**20
"""Smaller parts are merged by `compact`; larger ones are not written again."""


class LedgerConflict(ValueError):
    """One key has two values; the message names both and their files."""


class LedgerDamaged(ValueError):
    """A part cannot be read; the message names it."""


@dataclass(frozen=True)
class ValueKey:
    """What a number is a number of."""

    image_sha256: str
    reference_sha256: str
    """Empty where the metric looks at no reference."""
    prompt_sha256: str
    """Of the UTF-8 text; empty where the metric reads no prompt."""
    metric: str
    protocol: str
    weights: str
    """Digest of the metric's weights; empty where it has none."""


@dataclass(frozen=True)
class FeatureKey:
    """What a block of features was computed from."""

    image_sha256: str
    feature: str
    """Such as "inception2048/noantialias/v1"."""
    weights: str


VALUE_KEYS = tuple(ValueKey.__dataclass_fields__)
FEATURE_KEYS = tuple(FeatureKey.__dataclass_fields__)
VALUE_SCHEMA = pa.schema([*((name, pa.string()) for name in VALUE_KEYS), ("value", pa.float64())])


def prompt_digest(prompt: str) -> str:
    """sha256 of a prompt's UTF-8 text."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def _same(first: float | None, second: float | None) -> bool:
    """Bit for bit; two NaN or two null agree."""
    if first is None or second is None:
        return first is second
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) and math.isnan(second)
    return struct.pack("<d", first) == struct.pack("<d", second)


class _Parts:
    """A folder of immutable Parquet files, each named by its bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    @contextmanager
    def locked(self, *, alone: bool) -> Iterator[None]:
        """Readers and writers together, or a compaction alone; a dead process holds no lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    def write(self, table: pa.Table) -> Path:
        """One more part; the caller holds the lock."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=_COMPRESSION)
        data = memoryview(sink.getvalue())
        name = f"part-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        target = self.folder / name
        write_bytes(target, data, durable=True, contended=True)
        return target

    def read(self, path: Path, **options: Any) -> pa.Table:
        try:
            return pq.read_table(path, **options)
        except (pa.ArrowInvalid, OSError) as problem:
            raise LedgerDamaged(
                f"{path}: not readable ({problem}); remove it, and what it held is measured again"
            ) from None

    def remove_leftovers(self) -> None:
        """Temporary files of killed writers; the caller is alone."""
        for path in self.folder.glob(".part-*"):
            path.unlink()


class Ledger:
    """The measurements below one folder.

    Args:
        folder: created with the first append.
    """

    def __init__(self, folder: Path) -> None:
        self._values = _Parts(folder / "values")
        self._features = folder / "features"

    # Values

    def append(self, values: Mapping[ValueKey, float | None]) -> None:
        """Keep values; they are on disk when this returns.

        Args:
            values: None where a metric says that it cannot measure this picture.
        """
        if not values:
            return
        rows = sorted((*astuple(key), value) for key, value in values.items())
        columns = list(zip(*rows, strict=True))
        table = pa.table([pa.array(column) for column in columns[:-1]], names=list(VALUE_KEYS))
        table = table.append_column("value", pa.array(columns[-1], pa.float64()))
        with self._values.locked(alone=False):
            self._values.write(table.cast(VALUE_SCHEMA))

    def find(self, keys: Iterable[ValueKey]) -> dict[ValueKey, float | None]:
        """Values of those keys that have one.

        Raises:
            LedgerConflict: a key has two values.
            LedgerDamaged: a part cannot be read.
        """
        wanted = set(keys)
        if not wanted:
            return {}
        images = pa.array(sorted({key.image_sha256 for key in wanted}))
        found = self._merged(images)
        return {key: found[key] for key in wanted & found.keys()}

    def table(self) -> pa.Table:
        """Every value, in the order of the keys.

        Raises:
            LedgerConflict: a key has two values.
            LedgerDamaged: a part cannot be read.
        """
        return _sorted_table(self._merged(None))

    def _merged(self, images: pa.Array | None) -> dict[ValueKey, float | None]:
        with self._values.locked(alone=False):
            return self._merge(self._values.files(), images)

    def _merge(
        self, files: Sequence[Path], images: pa.Array | None
    ) -> dict[ValueKey, float | None]:
        """Rows of the parts, of all images or of some; the caller holds the lock."""
        merged: dict[ValueKey, float | None] = {}
        origin: dict[ValueKey, Path] = {}
        for path in files:
            table = self._values.read(path, columns=VALUE_SCHEMA.names)
            if images is not None:
                table = table.filter(pc.is_in(table["image_sha256"], value_set=images))
            columns = [table[name].to_pylist() for name in VALUE_SCHEMA.names]
            for *key_fields, value in zip(*columns, strict=True):
                key = ValueKey(*key_fields)
                if key in merged and not _same(merged[key], value):
                    raise LedgerConflict(
                        f"{key.metric} of image {key.image_sha256[:12]}: {merged[key]!r} in "
                        f"{origin[key]} and {value!r} in {path}; remove the wrong file, or both "
                        "to measure again"
                    )
                merged.setdefault(key, value)
                origin.setdefault(key, path)
        return merged

    # Features

    def _feature_parts(self, feature: str) -> _Parts:
        return _Parts(self._features / feature.replace("/", "__"))

    def append_features(self, blocks: Mapping[FeatureKey, Features]) -> None:
        """Keep features; they are on disk when this returns.

        Args:
            blocks: (k, d) float32 each; k may differ from picture to picture, d may not.

        Raises:
            ValueError: another shape or type.
        """
        by_feature: dict[str, dict[FeatureKey, Features]] = {}
        for key, block in blocks.items():
            if block.ndim != 2 or block.dtype != np.float32:
                raise ValueError(
                    f"{key.feature}: features must be float32 (k, d), got {block.dtype} "
                    f"{block.shape}"
                )
            by_feature.setdefault(key.feature, {})[key] = block
        for feature, group in by_feature.items():
            parts = self._feature_parts(feature)
            with parts.locked(alone=False):
                parts.write(_feature_table(group))

    def find_features(self, keys: Iterable[FeatureKey]) -> dict[FeatureKey, Features]:
        """(k, d) float32 of those keys that have features.

        Raises:
            LedgerConflict: a key has two different blocks.
            LedgerDamaged: a part cannot be read.
        """
        wanted = set(keys)
        found: dict[FeatureKey, Features] = {}
        for feature in sorted({key.feature for key in wanted}):
            images = sorted(key.image_sha256 for key in wanted if key.feature == feature)
            parts = self._feature_parts(feature)
            with parts.locked(alone=False):
                blocks = _merge_features(parts, parts.files(), pa.array(images))
            found |= {key: blocks[key] for key in wanted & blocks.keys()}
        return found

    def known_features(self, keys: Iterable[FeatureKey]) -> set[FeatureKey]:
        """Those keys that have features, without reading any."""
        wanted = set(keys)
        known: set[FeatureKey] = set()
        for feature in {key.feature for key in wanted}:
            parts = self._feature_parts(feature)
            with parts.locked(alone=False):
                for path in parts.files():
                    table = parts.read(path, columns=list(FEATURE_KEYS))
                    rows = zip(*(table[name].to_pylist() for name in FEATURE_KEYS), strict=True)
                    known |= wanted & {FeatureKey(*row) for row in rows}
        return known

    # Upkeep

    def compact(self) -> None:
        """Merge small parts into one, alone; killed in the middle, nothing is lost.

        Raises:
            LedgerConflict: a key has two values.
            LedgerDamaged: a part cannot be read.
        """
        with self._values.locked(alone=True):
            self._values.remove_leftovers()
            small = _small(self._values)
            if len(small) > 1:
                _replace(self._values, small, _sorted_table(self._merge(small, None)))
        for folder in sorted(self._features.glob("*")):
            parts = _Parts(folder)
            with parts.locked(alone=True):
                parts.remove_leftovers()
                small = _small(parts)
                if len(small) > 1:
                    _replace(parts, small, _feature_table(_merge_features(parts, small, None)))


def _small(parts: _Parts) -> list[Path]:
    return [path for path in parts.files() if path.stat().st_size < SMALL_PART_BYTES]


def _replace(parts: _Parts, old: Sequence[Path], table: pa.Table) -> None:
    """The merged part first: in between, every row stands twice, and both agree."""
    merged = parts.write(table)
    for path in old:
        if path != merged:
            path.unlink()


def _sorted_table(values: Mapping[ValueKey, float | None]) -> pa.Table:
    keys = sorted(values, key=astuple)
    columns = [pa.array([getattr(key, name) for key in keys], pa.string()) for name in VALUE_KEYS]
    return pa.table(
        [*columns, pa.array([values[key] for key in keys], pa.float64())], schema=VALUE_SCHEMA
    )


def _feature_table(blocks: Mapping[FeatureKey, Features]) -> pa.Table:
    """A row per key; a block is a list of fixed-size vectors."""
    keys = sorted(blocks, key=astuple)
    sizes = {blocks[key].shape[1] for key in keys}
    if len(sizes) != 1:
        raise ValueError(f"{keys[0].feature}: vectors of different lengths {sorted(sizes)}")
    flat = np.concatenate([blocks[key].reshape(-1) for key in keys])
    counts = [blocks[key].shape[0] for key in keys]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), sizes.pop())
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int64())
    lists = pa.LargeListArray.from_arrays(offsets, vectors)
    columns = [pa.array([getattr(key, name) for key in keys]) for name in FEATURE_KEYS]
    return pa.table([*columns, lists], names=[*FEATURE_KEYS, "vectors"])


def _merge_features(
    parts: _Parts, files: Sequence[Path], images: pa.Array | None
) -> dict[FeatureKey, Features]:
    merged: dict[FeatureKey, Features] = {}
    origin: dict[FeatureKey, Path] = {}
    for path in files:
        table = parts.read(path)
        if images is not None:
            table = table.filter(pc.is_in(table["image_sha256"], value_set=images))
        names = zip(*(table[name].to_pylist() for name in FEATURE_KEYS), strict=True)
        blocks = (block for chunk in table["vectors"].chunks for block in _blocks(chunk))
        for row, block in zip(names, blocks, strict=True):
            key = FeatureKey(*row)
            if key in merged and merged[key].tobytes() != block.tobytes():
                raise LedgerConflict(
                    f"{key.feature} of image {key.image_sha256[:12]} differs between "
                    f"{origin[key]} and {path}; remove the wrong file, or both to measure again"
                )
            merged.setdefault(key, block)
            origin.setdefault(key, path)
    return merged


def _blocks(lists: Any) -> Iterator[Features]:
    """(k, d) of each row of a chunk."""
    width = lists.type.value_type.list_size
    for number in range(len(lists)):
        vectors = lists[number].values
        yield np.array(vectors.flatten(), dtype=np.float32).reshape(len(vectors), width)
