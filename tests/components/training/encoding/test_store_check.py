"""Checking whole stores and encoding a damaged shard again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from components.images.aspect_buckets import Bucket
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.tiny import build_tiny_autoencoder
from components.settings.training import LatentsSettings
from components.training.encoding.latents import MEAN, EncodingItem, encode_corpus
from components.training.encoding.store_check import RebuildDiffers, check_store, rebuild_shard
from components.training.stores.latent_store import LatentStore
from flows.cli import app

SETTINGS = LatentsSettings(batch_size=2, dtype="float32", shard_mb=1)
Corpus = tuple[list[EncodingItem], AutoencoderKLF16, Path]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Five photographs, their encoder and their store."""
    torch.set_num_threads(1)
    items = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 70, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        items.append(EncodingItem(f"image{number}", "train", path, Bucket(64, 64)))
    vae = build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
    store = tmp_path / "store"
    encode_corpus(items, vae, SETTINGS, work_dir=tmp_path / "work", destination=store)
    return items, vae, store


def damage(store: Path) -> Path:
    shard = store / "64x64-00000.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.unlink()
    shard.write_bytes(data)
    return shard


def test_a_sound_store_is_read_wholly_and_a_damaged_record_is_listed(corpus: Corpus) -> None:
    found = check_store(corpus[2])
    assert (found.shards, found.records, found.bad) == (1, 5, ())
    assert found.nbytes == (corpus[2] / "64x64-00000.bin").stat().st_size
    damage(corpus[2])
    (bad,) = check_store(corpus[2]).bad
    assert (bad.shard, bad.image_id) == ("64x64-00000.bin", "image2")
    assert "do not have hash" in bad.problem


def test_a_rebuilt_shard_has_the_old_bytes(corpus: Corpus) -> None:
    items, vae, folder = corpus
    before = (folder / "64x64-00000.bin").read_bytes()
    shard = damage(folder)
    store = LatentStore(folder)
    assert (
        rebuild_shard(store, shard.name, items, vae, SETTINGS, max_megapixels=100, posterior=MEAN)
        == 5
    )
    assert shard.read_bytes() == before


def test_a_rebuilt_shard_is_on_the_disk_before_it_has_its_name(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The index promises these bytes already: after a power cut they have to be there.
    items, vae, folder = corpus
    shard = damage(folder)
    size, sizes = shard.stat().st_size, []
    flush = os.fsync

    def note_flush(descriptor: int) -> None:
        flush(descriptor)
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == folder:
            sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", note_flush)
    store = LatentStore(folder)
    rebuild_shard(store, shard.name, items, vae, SETTINGS, max_megapixels=100, posterior=MEAN)
    assert sizes == [size]


def test_another_encoder_leaves_the_shard_alone(corpus: Corpus) -> None:
    items, _, folder = corpus
    other = build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, seed=9)
    damaged = damage(folder).read_bytes()
    with pytest.raises(RebuildDiffers, match="5 of 5 records"):
        rebuild_shard(
            LatentStore(folder),
            "64x64-00000.bin",
            items,
            other,
            SETTINGS,
            max_megapixels=100,
            posterior=MEAN,
        )
    assert (folder / "64x64-00000.bin").read_bytes() == damaged


def test_an_unknown_shard_is_refused_with_those_there_are(corpus: Corpus) -> None:
    items, vae, folder = corpus
    with pytest.raises(ValueError, match=r"no shard x\.bin; it has 64x64-00000\.bin"):
        rebuild_shard(
            LatentStore(folder), "x.bin", items, vae, SETTINGS, max_megapixels=100, posterior=MEAN
        )


def test_the_command_prints_a_table_and_its_exit_code_tells(corpus: Corpus, tmp_path: Path) -> None:
    runner = CliRunner()
    sound = runner.invoke(app, ["stores", "verify", str(corpus[2])])
    assert sound.exit_code == 0
    assert "records" in sound.output
    damage(corpus[2])
    damaged = runner.invoke(app, ["stores", "verify", str(corpus[2])])
    assert damaged.exit_code == 1
    assert "image2" in damaged.output
    nothing = runner.invoke(app, ["stores", "verify", str(tmp_path / "nowhere")])
    assert nothing.exit_code not in (0, 1)
    assert "not a finished store" in nothing.output
