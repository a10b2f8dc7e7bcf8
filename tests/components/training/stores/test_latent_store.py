"""Latent store: exact round trips, hashes, resumption, deterministic bytes."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from components.training.stores.latent_store import (
    INDEX_COLUMNS,
    KIND,
    LatentCorrupt,
    LatentStore,
    LatentStoreIncomplete,
    LatentStoreWriter,
)
from components.training.stores.stored_tensors import StoreDtype, to_record

FORK = multiprocessing.get_context("fork")
BUCKETS = ((64, 96), (96, 64), (64, 64))


def latent(number: int) -> torch.Tensor:
    height, width = BUCKETS[number % 3]
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, height // 16, width // 16, generator=generator)


def open_writer(folder: Path, dtype: StoreDtype = "float32") -> LatentStoreWriter:
    return LatentStoreWriter(folder, dtype=dtype, shard_mb=0.001, encoder_digest="e" * 8)


def fill(writer: LatentStoreWriter, count: int = 18, pause_s: float = 0.0) -> None:
    """Append what is missing in batches of two of one bucket."""
    for bucket in range(3):
        numbers = range(bucket, count, 3)
        for batch in zip(numbers[0::2], numbers[1::2], strict=False):
            if f"image-{batch[0]}" in writer.stored():
                continue
            images = [(f"image-{n}", "eval" if n < 3 else "train") for n in batch]
            writer.append(BUCKETS[bucket], images, torch.stack([latent(n) for n in batch]))
            time.sleep(pause_s)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_is_read_back(tmp_path: Path, dtype: StoreDtype) -> None:
    writer = open_writer(tmp_path / "work", dtype)
    fill(writer)
    store = writer.publish(tmp_path / "store")
    assert len(store) == 18
    assert tuple(store.index.columns) == INDEX_COLUMNS
    for number in range(18):
        expected = latent(number).to(getattr(torch, dtype)).float()
        assert torch.equal(store.read(f"image-{number}"), expected)
    batch = store.read_batch(["image-3", "image-0"])
    assert torch.equal(batch[1], store.read("image-0"))
    assert set(store.index.loc[store.index["split"] == "eval", "image_id"]) == {
        "image-0",
        "image-1",
        "image-2",
    }


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=5),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_records_keep_every_bit(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    for dtype in (torch.float32, torch.bfloat16):
        record = bytearray(to_record(tensor, str(dtype).removeprefix("torch.")))
        stored = torch.frombuffer(record, dtype=dtype).reshape(tensor.shape)
        assert torch.equal(stored, tensor.to(dtype))


def test_a_record_is_little_endian_row_major() -> None:
    tensor = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert to_record(tensor, "float32") == np.array([1, 2, 3, 4], dtype="<f4").tobytes()
    # bfloat16 is the upper half of a float32.
    assert to_record(tensor, "bfloat16")[:2] == np.array([1], dtype="<f4").tobytes()[2:]


def test_records_of_a_bucket_have_one_size_and_shards_respect_their_limit(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    for _, rows in store.index.groupby("bucket"):
        assert rows["nbytes"].nunique() == 1
        assert rows["shard"].nunique() > 1
    for shard, rows in store.index.groupby("shard"):
        size = (tmp_path / "store" / str(shard)).stat().st_size
        assert size == rows["nbytes"].sum() <= 0.001 * 2**20
        assert (rows["offset"] == np.arange(len(rows)) * rows["nbytes"]).all()


def test_a_killed_writer_continues_to_the_same_bytes(tmp_path: Path) -> None:
    undisturbed = open_writer(tmp_path / "work-a")
    fill(undisturbed, 36)
    undisturbed.publish(tmp_path / "a")
    kills = 0
    for _ in range(8):
        child = FORK.Process(target=lambda: fill(open_writer(tmp_path / "work-b"), 36, 0.01))
        child.start()
        time.sleep(0.06)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills > 1
    writer = open_writer(tmp_path / "work-b")
    assert writer.stored()
    fill(writer, 36)
    writer.publish(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bytes_after_the_last_journalled_batch_are_cut_off(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer, 12)
    expected = contents(writer.publish(tmp_path / "a").folder)
    for shard in (tmp_path / "work").glob("*.bin"):
        torn = shard.read_bytes() + b"torn"
        shard.unlink()
        shard.write_bytes(torn)
    with (tmp_path / "work" / "journal.jsonl").open("a") as journal:
        journal.write('[{"image_id": "half')
    again = open_writer(tmp_path / "work")
    assert len(again.stored()) == 12
    assert contents(again.publish(tmp_path / "b").folder) == expected


def test_a_lost_shard_restarts_the_work(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    next((tmp_path / "work").glob("*.bin")).unlink()
    assert open_writer(tmp_path / "work").stored() == frozenset()


def test_another_encoder_discards_the_work(tmp_path: Path) -> None:
    fill(open_writer(tmp_path / "work"))
    other = LatentStoreWriter(
        tmp_path / "work", dtype="float32", shard_mb=0.001, encoder_digest="other"
    )
    assert other.stored() == frozenset()
    assert not list((tmp_path / "work").glob("*.bin"))


def test_appending_after_publishing_leaves_the_published_store_alone(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer, 6)
    store = writer.publish(tmp_path / "store")
    before = contents(store.folder)
    fill(writer, 36)
    assert contents(store.folder) == before


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_damaged_record_names_shard_and_image(tmp_path: Path, damage: str) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    row = store.index[store.index["image_id"] == "image-4"].iloc[0]
    shard = tmp_path / "store" / row["shard"]
    content = bytearray(shard.read_bytes())
    content[row["offset"] + 5] ^= 1
    shard.unlink()
    if damage == "flipped":
        shard.write_bytes(content)
    elif damage == "short":
        shard.write_bytes(content[: row["offset"] + 5])
    with pytest.raises(LatentCorrupt, match=rf"{row['shard']}.*image-4"):
        store.read("image-4")


def test_an_unknown_image_is_a_key_error(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    assert "image-1" in store
    assert "nobody" not in store
    with pytest.raises(KeyError, match="nobody"):
        store.read("nobody")


def test_a_folder_without_index_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(LatentStoreIncomplete, match="latents"):
        LatentStore(tmp_path)


def test_latents_that_are_not_finite_or_repeated_are_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    with pytest.raises(ValueError, match="not finite"):
        writer.append((64, 64), [("a", "train")], torch.full((1, 4, 4, 4), float("nan")))
    writer.append((64, 64), [("a", "train")], torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="stored already"):
        writer.append((64, 64), [("a", "train")], torch.zeros(1, 4, 4, 4))


def test_the_digest_follows_content_not_row_order(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    shuffled = store.index.sample(frac=1.0, random_state=0)
    assert KIND.digest(shuffled) == store.digest
    changed = store.index.copy()
    changed["xxh64"] = changed["xxh64"].where(pd.Series(range(len(changed))) != 2, "0" * 16)
    assert KIND.digest(changed) != store.digest


def test_stored_precision_is_read_into_a_tensor_that_is_there(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work", "bfloat16")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    out = torch.zeros(2, *latent(3).shape, dtype=torch.bfloat16)
    assert store.read_stored(["image-3", "image-0"], out=out) is out
    assert torch.equal(out[0], latent(3).bfloat16())
    assert torch.equal(out.float(), store.read_batch(["image-3", "image-0"]))


def test_a_batch_of_two_buckets_is_refused_even_where_records_have_one_size(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "work")
    fill(writer)
    store = writer.publish(tmp_path / "store")
    with pytest.raises(ValueError, match="one bucket at a time"):
        store.read_batch(["image-0", "image-1"])
