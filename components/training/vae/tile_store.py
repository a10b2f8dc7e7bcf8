"""The tiles of a slice in shards on disk: cut once through the engine, resumable, bounded.

Layout of a store: `FOLDER/<digest>/` with `tiles-<number>.bin` (raw records), `store.json` (rules,
and which photographs are left out) and `index.parquet` (a row per tile, photographs in the order of
the slice). The digest names the photographs, the rules and what the cutting code means, so a change
of anything else (seed, learning rate, batch) finds the store that is there. The index is written
last: where it is, the store is whole. A kill loses at most the photographs in hand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from components.engine.map_items import open_pool
from components.engine.ordered_pool import EngineLimits, Failure
from components.files.code_identity import CodeIdentity
from components.files.holder_locks import folder_alone
from components.files.whole_files import whole_file, write_text
from components.telemetry.progress import track
from components.training.stores.record_writer import INDEX_FILE, MIB, STORE_FILE, RecordWriter
from components.training.vae.tiles import (
    CutPhotograph,
    LeftOut,
    Photograph,
    TileRules,
    cut_photograph,
)

SHARD_MIB = 512
"""Half a million photographs of two 1,024 px tiles fill 6,000 shards."""
VERSION = 1
_SERIES = "tiles"
_GROUP_BYTES = 64 * MIB
_GROUP_PHOTOGRAPHS = 256
"""What is flushed together, and what a kill repeats at most."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOT = Path(__file__).resolve().parents[3]


class NoTiles(ValueError):
    """No photograph is left to cut crops from; one line."""


class TooManyUndecodable(ValueError):
    """More photographs than the settings allow cannot be decoded; one line."""


class NoRoomForTiles(RuntimeError):
    """The tiles do not fit on the disk; a retry would end alike; one line."""


def tiles_digest(
    photographs: Sequence[Photograph], rules: TileRules, at_most: int | None = None
) -> str:
    """Sha256 of everything that decides the records of a store."""
    content = {
        "version": VERSION,
        "rules": asdict(rules),
        "at_most": at_most,
        # What the code means and not its text: a comment cuts no tile again.
        "code": CodeIdentity(_ROOT).fingerprint(TileRules.__module__),
        "photographs": [photograph.image_id for photograph in photographs],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_tiles(
    photographs: Sequence[Photograph],
    rules: TileRules,
    folder: Path,
    *,
    limits: EngineLimits | None = None,
    max_rejected_fraction: float = 1.0,
    at_most: int | None = None,
    shard_mib: float = SHARD_MIB,
) -> Path:
    """Cut what is not there yet; continues where a killed run stopped, with the same bytes.

    Args:
        photographs: originals with different ids; their order is that of the store.
        rules: what a tile is.
        folder: of all stores.
        limits: worker processes and what one photograph may cost; None: in this process.
        max_rejected_fraction: share of the photographs that may turn out undecodable.
        at_most: stop once this many photographs have tiles; None: all of them.
        shard_mib: a shard takes no further tile beyond this size in MiB (at least one tile).

    Returns:
        folder of the store.

    Raises:
        NoTiles: no photographs, or none with room for a crop.
        TooManyUndecodable: more photographs cannot be decoded than `max_rejected_fraction`.
        NoRoomForTiles: the disk is too small for what is to come, or full.
        ValueError: another run is cutting the same tiles.
        WorkersDoNotStart: workers die before they take a photograph.
    """
    if not photographs:
        raise NoTiles("no photographs to cut crops from")
    store = folder / tiles_digest(photographs, rules, at_most)[:16]
    if (store / INDEX_FILE).exists():
        return store
    try:
        store.mkdir(parents=True, exist_ok=True)
        with folder_alone(store, "another run is cutting these tiles; wait for it to end"):
            # Whoever held the lock before may have finished it.
            if not (store / INDEX_FILE).exists():
                cutting = _Cutting(photographs, rules, store, shard_mib)
                cutting.run(limits, int(max_rejected_fraction * len(photographs)), at_most)
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        raise NoRoomForTiles(
            f"{store}: {problem.strerror} while cutting tiles; {_ADVICE}"
        ) from None
    return store


_ADVICE = (
    "what is cut is kept: make room and run again, or choose fewer "
    "(vae.tiles_per_photograph) or smaller (vae.tile_px) tiles; other folders beside it hold tiles "
    "of other settings and may be deleted"
)


class _Cutting:
    """One store in the making."""

    def __init__(
        self, photographs: Sequence[Photograph], rules: TileRules, store: Path, shard_mib: float
    ) -> None:
        self._photographs, self._rules, self._store = photographs, rules, store
        # The folder's name says what the records depend on.
        self._writer = RecordWriter(
            store, key="tile", header={"store": store.name}, shard_bytes=int(shard_mib * MIB)
        )
        self._group: list[CutPhotograph] = []
        self._left_out: list[LeftOut] = []
        self._room_is_checked = False

    def run(self, limits: EngineLimits | None, allowed: int, at_most: int | None) -> None:
        """Cut, and finish the store.

        Args:
            limits: see `make_tiles`.
            allowed: photographs that may turn out undecodable.
            at_most: see `make_tiles`.
        """
        stored = {_image_id(row["tile"]) for row in self._writer.rows}
        numbered = list(enumerate(self._photographs))
        # Those left out are not stored, so a continued run finds out about them again.
        pending = [(number, one) for number, one in numbered if one.image_id not in stored]
        last_stored = max((n for n, one in numbered if one.image_id in stored), default=-1)
        kept = len(stored)
        results = self._results([one for _, one in pending], limits)
        total = len(self._photographs)
        shown = track(results, "tiles", total=total, initial=total - len(pending))
        # Ends the workers too where the loop is left early.
        with closing(results):  # type: ignore[type-var]
            for (number, photograph), result in zip(pending, shown, strict=True):
                # Past what an earlier run has stored, so that none left out there is forgotten.
                if at_most is not None and kept >= at_most and number > last_stored:
                    break
                if isinstance(result, CutPhotograph):
                    kept += 1
                    self._keep(result, remaining=(at_most or total) - kept)
                else:
                    self._leave_out(photograph, result, allowed)
        self._flush()
        if not self._writer.rows:
            raise NoTiles(self._none_left())
        self._finish()

    def _results(
        self, todo: Sequence[Photograph], limits: EngineLimits | None
    ) -> Iterator[CutPhotograph | LeftOut | Failure]:
        cut = partial(cut_photograph, rules=self._rules)
        if limits is None or not todo:
            return (cut(photograph) for photograph in todo)
        return open_pool(cut, limits).map(todo)

    def _keep(self, cut: CutPhotograph, remaining: int) -> None:
        self._group.append(cut)
        held = sum(len(record) for one in self._group for record in one.records)
        if held >= _GROUP_BYTES or len(self._group) == _GROUP_PHOTOGRAPHS:
            self._check_room(held / len(self._group) * remaining)
            self._flush()

    def _check_room(self, needed: float) -> None:
        """Once, with the first photographs as a sample: hours before the disk would be full."""
        free = shutil.disk_usage(self._store).free
        if not self._room_is_checked and needed > free:
            raise NoRoomForTiles(
                f"{self._store}: about {needed / 1e9:,.1f} GB of tiles are still to come and "
                f"{free / 1e9:,.1f} GB are free; {_ADVICE}"
            )
        self._room_is_checked = True

    def _flush(self) -> None:
        rows, records = [], []
        for cut in self._group:
            for number, (place, record) in enumerate(zip(cut.places, cut.records, strict=True)):
                rows.append({"tile": f"{cut.image_id}/{number}", **asdict(place)})
                records.append(record)
        if rows:
            # All tiles of a photograph in one batch: it is stored as a whole or not at all.
            self._writer.append(_SERIES, rows, records)
        self._group = []

    def _leave_out(self, photograph: Photograph, why: LeftOut | Failure, allowed: int) -> None:
        if isinstance(why, Failure):
            # Its worker crashed, hung or ran out of memory; the engine tried more than once.
            name = photograph.path.name
            why = LeftOut(photograph.image_id, name, "undecodable", f"quarantined: {why.message}")
        self._left_out.append(why)
        bad = [one for one in self._left_out if one.kind == "undecodable"]
        # At once, and not after days: a wrong path or a broken disk rejects nearly everything.
        if why.kind == "undecodable" and len(bad) > allowed:
            raise TooManyUndecodable(
                f"{len(bad)} of {len(self._photographs)} photographs cannot be decoded, {allowed} "
                f"may (vae.max_rejected_fraction); first {bad[0].name}: {bad[0].reason}"
            )

    def _none_left(self) -> str:
        first = self._left_out[0]
        return (
            f"none of {len(self._photographs)} photographs has room for a crop of vae.crop_px = "
            f"{self._rules.crop_px}; first {first.name}: {first.reason}; choose smaller crops or "
            "other photographs"
        )

    def _finish(self) -> None:
        about = {
            "version": VERSION,
            "rules": asdict(self._rules),
            "left_out": [asdict(one) for one in self._left_out],
        }
        text = json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(self._store / STORE_FILE, text, durable=True)
        index = pd.DataFrame(self._writer.rows)
        index.insert(0, "image_id", index["tile"].map(_image_id))
        index["photograph"] = (index["image_id"] != index["image_id"].shift()).cumsum() - 1
        with whole_file(self._store / INDEX_FILE, durable=True) as temporary:
            index.drop(columns="tile").to_parquet(temporary, index=False)
        self._writer.remove_journal()


def _image_id(tile: str) -> str:
    return tile.rpartition("/")[0]


def read_tiles(store: Path) -> tuple[pd.DataFrame, dict[str, Any], list[LeftOut]]:
    """What stands beside the shards of a finished store: (index, rules, photographs left out).

    The index has one row per tile and the columns photograph (number in order), height, width,
    shard, offset, nbytes, xxh64; the others (image_id, top, left) stay on the disk.

    Raises:
        FileNotFoundError: the store is not finished.
    """
    columns = ["photograph", "height", "width", "shard", "offset", "nbytes", "xxh64"]
    index = pd.read_parquet(store / INDEX_FILE, columns=columns)
    about = json.loads((store / STORE_FILE).read_text(encoding="utf-8"))
    return index, about["rules"], [LeftOut(**one) for one in about["left_out"]]


def count_left_out(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """How many photographs were left out, by kind; both kinds are always there."""
    kinds = [one.kind for one in left_out]
    return {kind: kinds.count(kind) for kind in ("narrow", "undecodable")}
