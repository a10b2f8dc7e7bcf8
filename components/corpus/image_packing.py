"""Writes the image store: deterministic tar shards, of which only changed ones are rewritten.

Nothing that exists is changed in place: new shards get new names, the index is replaced when all of
them are on disk, and what no row names is removed last. So a killed run leaves the old version
whole, the next one uses the shards that were finished, and files that DVC has linked from its cache
are never written to.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from components.corpus.sources.image_probe import image_extension
from components.files.holder_locks import folder_alone
from components.files.parquet_files import write_parquet
from components.images.image_store import INDEX_NAME, INDEX_SCHEMA, SHARD_NAME, read_index
from components.images.original_lookup import Original
from components.telemetry.progress import track

# Part of a shard's name: another layout of the same images is another file.
_LAYOUT = b"ultraflux tar shard 1"
_UNKNOWN_FORMAT = ".img"
_HEADER_BYTES = tarfile.BLOCKSIZE

Row = dict[str, Any]


@dataclass(frozen=True)
class PackReport:
    """What a run of packing did."""

    images: int
    """In the store now."""
    total_bytes: int
    """Of these originals."""
    shards: int
    written: int
    """Shards that were not there before."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Wanted originals that could not be packed: file name -> why."""


def shard_name(prefix: str, image_ids: Sequence[str]) -> str:
    """Name of the shard that holds exactly these images (sorted)."""
    digest = hashlib.sha256(_LAYOUT)
    for image_id in image_ids:
        digest.update(image_id.encode())
    return f"{prefix}-{digest.hexdigest()[:16]}.tar"


def _append(archive: tarfile.TarFile, image_id: str, data: bytes) -> Row:
    """Add one original; nothing of its origin enters the header."""
    extension = image_extension(data[:64]) or _UNKNOWN_FORMAT
    member = tarfile.TarInfo(f"{image_id}{extension}")
    member.size = len(data)
    row = {
        "image_id": image_id,
        # USTAR headers are one block, since names are short: the bytes begin right behind it, and a
        # reader seeks there without opening a tar.
        "offset": archive.offset + _HEADER_BYTES,
        "size": len(data),
        "format": extension.removeprefix("."),
    }
    archive.addfile(member, io.BytesIO(data))
    return row


def _write_shard(
    folder: Path, prefix: str, originals: Sequence[Original], unreadable: dict[str, str]
) -> list[Row]:
    """Write the shard of these originals (sorted), without those that cannot be read.

    Returns:
        its rows of the index; none when nothing could be read, and then there is no file.
    """
    rows: list[Row] = []
    temporary = folder / f".{prefix}.partial"
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for original in originals:
                try:
                    data = original.read_bytes()
                except OSError as problem:
                    unreadable[original.name] = problem.strerror or type(problem).__name__
                    continue
                rows.append(_append(archive, original.image_id, data))
        file.flush()
        # Its name says what is in it; the name may not be on disk before the bytes.
        os.fsync(file.fileno())
    if not rows:
        temporary.unlink()
        return []
    name = shard_name(prefix, [row["image_id"] for row in rows])
    temporary.replace(folder / name)
    return [row | {"shard": name} for row in rows]


def _scan_shard(path: Path) -> list[Row]:
    """Rows of the index for a shard that a killed run finished."""
    with tarfile.open(path, mode="r:") as archive:
        return [
            {
                "image_id": member.name.partition(".")[0],
                "shard": path.name,
                "offset": member.offset_data,
                "size": member.size,
                "format": member.name.partition(".")[2],
            }
            for member in archive
        ]


def _by_prefix(originals: Sequence[Original], digits: int) -> dict[str, list[Original]]:
    """Each image once, sorted, under the first digits of its id."""
    groups: dict[str, list[Original]] = {}
    # Backwards, so that of equal originals the first stays, whatever its copies' paths are.
    distinct = {original.image_id: original for original in reversed(originals)}
    for image_id in sorted(distinct):
        groups.setdefault(image_id[:digits], []).append(distinct[image_id])
    return groups


def _remove_unnamed(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        # Nothing else is touched: the folder may hold what somebody put there.
        ours = SHARD_NAME.fullmatch(path.name) or path.name.endswith(".partial")
        if ours and path.name not in names:
            path.unlink()


def pack_images(originals: Sequence[Original], folder: Path, *, shard_digits: int) -> PackReport:
    """Make the store hold exactly these originals, as far as their bytes can be had.

    An original is read from its path or from the store as it is, and verified; shards whose set of
    images is unchanged are left alone. The store is the same bytes whatever was there before.

    Args:
        originals: from `OriginalLookup`; repeated images count once.
        folder: the store.
        shard_digits: 1 to 3 hexadecimal digits of the sha256 decide the shard: 16, 256 or 4,096.

    Returns:
        counts, and the originals that are not in the store because they cannot be read.

    Raises:
        ValueError: the index is damaged, or another process is packing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_alone(folder, "another packing is at work; wait for it to end"):
        known = read_index(folder)
        present = dict(list(known.groupby("shard", sort=False)))
        frames = [known.iloc[:0]]
        unreadable: dict[str, str] = {}
        written = 0
        groups = _by_prefix(originals, shard_digits)
        for prefix, members in track(sorted(groups.items()), "pack", total=len(groups)):
            name = shard_name(prefix, [original.image_id for original in members])
            if not (folder / name).is_file():
                rows = _write_shard(folder, prefix, members, unreadable)
                frames.append(pd.DataFrame(rows, columns=INDEX_SCHEMA.names))
                written += bool(rows)
            elif name in present:
                frames.append(present[name])
            else:
                # Whole by its name, but the killed run never wrote its rows: they are read back
                # from the headers.
                rows = _scan_shard(folder / name)
                frames.append(pd.DataFrame(rows, columns=INDEX_SCHEMA.names))
        index = pd.concat(frames).sort_values("image_id", ignore_index=True)
        table = pa.Table.from_pandas(index, schema=INDEX_SCHEMA, preserve_index=False)
        # Not pandas' own notes, which name library versions.
        table = table.replace_schema_metadata(INDEX_SCHEMA.metadata)
        names = set(index["shard"])
        if not index.equals(known) or not (folder / INDEX_NAME).is_file():
            write_parquet(table, folder / INDEX_NAME)
        _remove_unnamed(folder, names)
    return PackReport(
        images=len(index),
        total_bytes=int(index["size"].sum()),
        shards=len(names),
        written=written,
        unreadable=unreadable,
    )
