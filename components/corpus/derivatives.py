"""The small derivatives that the signals stage leaves for scorers and reports: read, score."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.engine.map_items import EngineLimits, code_digest, join_shards, map_items
from components.images import decoding
from components.signals import flat_regions


@dataclass(frozen=True)
class Derivative:
    """A small JPEG of one image and the size of its original."""

    image_id: str
    height: int
    width: int
    jpeg: bytes


def read_derivatives(path: Path) -> Iterator[Derivative]:
    """Images that could be decoded, in file order; one row group is in memory at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                if row["jpeg"] is not None:
                    yield Derivative(**row)


def derivative_ids(path: Path) -> list[str]:
    """image_id of what `read_derivatives` yields, without reading any picture twice."""
    return list(derivative_sizes(path))


def derivative_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of the originals of what `read_derivatives` yields, by image_id."""
    # By the height, which stands exactly where a JPEG does: the pictures' column is nearly all of
    # the file.
    table = pq.read_table(path, columns=["image_id", "height", "width"])
    columns = table.filter(table["height"].is_valid()).to_pydict()
    sizes = zip(columns["height"], columns["width"], strict=True)
    return dict(zip(columns["image_id"], sizes, strict=True))


def jpegs_of(path: Path, image_ids: Collection[str]) -> dict[str, bytes]:
    """Derivatives of a few images, those that there are; only their row groups are read."""
    wanted = pa.array(sorted(image_ids), pa.string())
    found: dict[str, bytes] = {}
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["image_id"])["image_id"]
            is_wanted = pc.is_in(ids, value_set=wanted)
            if not pc.any(is_wanted).as_py():
                continue
            for row in file.read_row_group(group).filter(is_wanted).to_pylist():
                if row["jpeg"] is not None:
                    found[row["image_id"]] = row["jpeg"]
    return found


def score_derivatives(
    function: Callable[[Derivative], dict[str, Any]],
    module: ModuleType,
    schema: pa.Schema,
    *,
    derivatives: Path,
    derivative_px: int,
    destination: Path,
    state_dir: Path,
    limits: EngineLimits,
    only: Collection[str] | None = None,
    key: Mapping[str, Any] | None = None,
    modules: Sequence[ModuleType] = (),
    outside: Sequence[type[Exception]] = (),
) -> None:
    """Score every derivative in worker processes into one Parquet file.

    Every finished row is kept at once: a run that is killed scores no image twice.

    Args:
        function: module-level scorer of one derivative (or a `functools.partial` of one); its keys
            are the columns beside image_id.
        module: where `function` stands; its name and source identify the shards.
        schema: of the result.
        derivatives: output of the signals stage.
        derivative_px: long edge that the derivatives were made with.
        destination: Parquet file to write.
        state_dir: survives kills.
        limits: workers and what one item may cost.
        only: image_id of those to score; None for all.
        key: settings and digests of weights that scores depend on, JSON-able.
        modules: further modules whose code makes the scores.
        outside: exceptions of `function` that say nothing about the image (no weights, no server).

    Raises:
        ItemsFailed: one of `outside` was raised; what was scored is kept.
    """
    # Ids are needed at once, for the shards' names; pictures come as a stream beside them.
    ids, pictures = derivative_ids(derivatives), read_derivatives(derivatives)
    if only is not None:
        wanted = frozenset(only)
        ids = [name for name in ids if name in wanted]
        pictures = (picture for picture in pictures if picture.image_id in wanted)
    shards = map_items(
        function,
        ids,
        pictures,
        stage=module.__name__.rsplit(".", 1)[-1],
        key={
            "derivative_px": derivative_px,
            "code": code_digest(
                decoding, *decoding.DECIDING_MODULES, flat_regions, module, *modules
            ),
            **(key or {}),
        },
        schema=schema,
        state_dir=state_dir,
        limits=limits,
        keep_items=True,
        outside=outside,
    )
    join_shards(shards, schema, destination)
