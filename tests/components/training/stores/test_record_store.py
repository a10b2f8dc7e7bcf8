"""A kind of store of one's own: what the common part gives it."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from components.training.stores.record_store import RecordStore, StoreKind, StoreWriter
from components.training.stores.stored_tensors import to_record


class MasksIncomplete(RuntimeError):
    pass


class MaskCorrupt(RuntimeError):
    pass


COLUMNS = ("image_id", "shard", "offset", "nbytes", "xxh64", "dtype", "encoder_digest")
KIND = StoreKind(
    name="masks",
    record="mask",
    stage="masks",
    version=1,
    columns=COLUMNS,
    identity=COLUMNS,
    incomplete=MasksIncomplete,
    corrupt=MaskCorrupt,
    remedy=", draw {shard} again",
)


class MaskStore(RecordStore):
    kind = KIND

    def read(self, *image_ids: str) -> Tensor:
        out = torch.empty(len(image_ids), 2, 3)
        self._read_into(self._rows_of(image_ids), out)
        return out


MASKS = {f"image{number}": torch.arange(6).reshape(2, 3) + 10.0 * number for number in range(5)}


def write(folder: Path, destination: Path, count: int = 5) -> None:
    writer = StoreWriter(
        KIND, folder, key="image_id", dtype="float32", encoder_digest="pen", shard_mb=1e-5
    )
    for image_id, mask in list(MASKS.items())[:count]:
        if image_id not in writer.records.stored():
            record = to_record(mask, "float32")
            writer.records.append("mask", [{"image_id": image_id}], [record])
    index = pd.DataFrame(writer.records.rows)
    writer.publish(destination, index, {"by": "hand"}, {"image9": "torn"})


def test_a_new_kind_of_store_is_written_found_and_read(tmp_path: Path) -> None:
    with pytest.raises(MasksIncomplete, match=r"no index\.parquet; run the stage `masks` first"):
        MaskStore(tmp_path / "store")
    write(tmp_path / "work", tmp_path / "store")
    store = MaskStore(tmp_path / "store")
    assert len(store) == 5
    assert "image3" in store
    assert "image9" not in store
    assert torch.equal(
        store.read("image3", "image0"), torch.stack([MASKS["image3"], MASKS["image0"]])
    )
    assert store.about == {
        "kind": "masks",
        "version": 1,
        "provenance": {"by": "hand"},
        "rejected": [{"image_id": "image9", "error": "torn"}],
    }
    with pytest.raises(KeyError, match="image image9 has no mask in"):
        store.read("image9")


def test_damage_is_told_in_the_words_of_the_kind(tmp_path: Path) -> None:
    write(tmp_path / "work", tmp_path / "store")
    shard = tmp_path / "store" / "mask-00000.bin"
    shard.unlink()
    shard.write_bytes(b"\1" * 24)
    with pytest.raises(
        MaskCorrupt,
        match=r"^shard mask-00000\.bin, image image0: bytes 0 to 24 .*; "
        r"`ultraflux stores verify .*` lists all such records, draw mask-00000\.bin again$",
    ):
        MaskStore(tmp_path / "store").read("image0")


def test_what_a_kill_left_beside_a_shard_is_gone_after_the_next_publication(tmp_path: Path) -> None:
    """Also where the corpus has become smaller, so that the shard's own name is not used again."""
    for folder in ("work", "store"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".mask-00009.bin.partial").write_bytes(b"half")
    write(tmp_path / "work", tmp_path / "store", count=2)
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"index.parquet", "store.json", "mask-00000.bin", "mask-00001.bin"}
    assert not (tmp_path / "work" / ".mask-00009.bin.partial").exists()
    # Appending after publication leaves the published store as it is.
    before = (tmp_path / "store" / "mask-00001.bin").read_bytes()
    write(tmp_path / "work", tmp_path / "larger")
    assert (tmp_path / "store" / "mask-00001.bin").read_bytes() == before
    assert len(MaskStore(tmp_path / "larger")) == 5


@pytest.mark.parametrize("has_links", [True, False])
def test_a_power_cut_leaves_no_index_of_records_that_are_not_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """The order of what is flushed: shards and their names before the index gets its own."""
    destination = tmp_path / "store"
    write(tmp_path / "work", destination)
    events: list[str] = []
    flush, rename = os.fsync, os.replace

    def note_flush(descriptor: int) -> None:
        flush(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == destination or path.parent == destination:
            events.append(f"flush {path.name}")

    def note_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).parent == destination:
            events.append(f"rename {Path(target).name}")

    def no_link(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    write(tmp_path / "work", destination)
    # The old index is gone for good before anything that it names.
    assert events[0] == "flush store"
    for name in (*(f"mask-0000{number}.bin" for number in range(5)), "store.json", "index.parquet"):
        at = events.index(f"rename {name}")
        assert events[at - 1] == f"flush .{name}.partial"
        assert events[at + 1] == "flush store"
    assert events[-2] == "rename index.parquet"


def test_a_batch_is_on_the_disk_before_its_line_and_the_line_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(
        KIND, tmp_path, key="image_id", dtype="float32", encoder_digest="pen", shard_mb=1
    )
    journal, shard = tmp_path / "journal.jsonl", tmp_path / "mask-00000.bin"
    header = journal.stat().st_size
    flushed: list[tuple[str, int, int]] = []
    flush = os.fsync

    def note_flush(descriptor: int) -> None:
        flush(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append((path.name, shard.stat().st_size, journal.stat().st_size))

    monkeypatch.setattr(os, "fsync", note_flush)
    record = to_record(MASKS["image0"], "float32")
    writer.records.append("mask", [{"image_id": "image0"}], [record])
    assert flushed == [
        (shard.name, len(record), header),
        (journal.name, len(record), journal.stat().st_size),
    ]
