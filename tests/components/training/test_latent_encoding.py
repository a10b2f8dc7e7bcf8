"""Encoding a corpus: normalisation, one bucket a batch, resumption with the same bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.tiny import build_tiny_autoencoder, synthetic_images
from components.settings import LatentsSettings
from components.training.aspect_buckets import Bucket, fit_to_bucket
from components.training.latent_encoding import (
    EncodingItem,
    band_energy_shares,
    batches,
    encode,
    encode_corpus,
    encoding_items,
    load_image,
    plan_digest,
)
from components.training.pixel_range import to_pixels

SETTINGS = LatentsSettings(batch_size=2, dtype="float32", shard_mb=1)
SIZES = ((96, 160), (160, 96), (128, 128))


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKLF16:
    return build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Nine 1/f photographs in three shapes, and their slice table."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "photos").mkdir()
    rows = []
    for number in range(9):
        height, width = SIZES[number % 3]
        pixels = to_pixels(synthetic_images(1, 200, number))[0][: height + 8, : width + 8]
        path = root / "photos" / f"{number}.png"
        Image.fromarray(pixels).save(path)
        rows.append(
            {
                "image_id": hashlib.sha256(path.read_bytes()).hexdigest(),
                "split": "eval" if number < 2 else "train",
                "uri": f"photos/{number}.png",
                "bucket_height": height,
                "bucket_width": width,
            }
        )
    return root, pd.DataFrame(rows)


def run(corpus: tuple[Path, pd.DataFrame], vae: AutoencoderKLF16, work: Path, out: Path) -> None:
    encode_corpus(
        encoding_items(corpus[1], corpus[0]), vae, SETTINGS, work_dir=work, destination=out
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stored_latents_are_the_normalised_posterior_modes(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    root, rows = corpus
    store = encode_corpus(
        encoding_items(rows, root),
        autoencoder,
        SETTINGS,
        work_dir=tmp_path / "work",
        destination=tmp_path / "out",
    )
    assert len(store) == 9
    for row in rows.to_dict("records"):
        image = Image.open(root / row["uri"]).convert("RGB")
        fitted = fit_to_bucket(image, Bucket(row["bucket_height"], row["bucket_width"]))
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0
        with torch.no_grad():
            mean = autoencoder._encode(pixels[None])[0, :16]
        config = autoencoder.config
        expected = (mean - config.shift_factor) * config.scaling_factor
        latent = store.read(row["image_id"])
        assert latent.shape == (16, row["bucket_height"] // 16, row["bucket_width"] // 16)
        torch.testing.assert_close(latent, expected, atol=1e-4, rtol=1e-4)


def test_latents_of_natural_statistics_have_unit_scale(autoencoder: AutoencoderKLF16) -> None:
    latents = encode(autoencoder, synthetic_images(4, 256, seed=99))
    assert abs(float(latents.mean())) < 0.3
    assert 0.7 < float(latents.std()) < 1.4


def test_decoding_undoes_the_normalisation(autoencoder: AutoencoderKLF16) -> None:
    images = synthetic_images(1, 64, seed=5)
    config = autoencoder.config
    latents = encode(autoencoder, images) / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        again = autoencoder.decode(latents).sample
        direct = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample
    torch.testing.assert_close(again, direct, atol=1e-4, rtol=1e-4)


def test_batches_never_mix_buckets_and_cover_every_image_once(
    corpus: tuple[Path, pd.DataFrame],
) -> None:
    items = encoding_items(corpus[1], corpus[0])
    plan = batches(items, 2)
    assert all(len({item.bucket for item in batch}) == 1 for batch in plan)
    assert sorted(item.image_id for batch in plan for item in batch) == sorted(
        corpus[1]["image_id"]
    )
    assert max(map(len, plan)) == 2


def test_the_plan_does_not_depend_on_row_order_or_repetition(
    corpus: tuple[Path, pd.DataFrame],
) -> None:
    root, rows = corpus
    shuffled = pd.concat([rows.sample(frac=1.0, random_state=1), rows.head(3)])
    assert plan_digest(batches(encoding_items(shuffled, root), 2)) == plan_digest(
        batches(encoding_items(rows, root), 2)
    )


def test_an_image_in_two_splits_is_refused(corpus: tuple[Path, pd.DataFrame]) -> None:
    root, rows = corpus
    leaked = pd.concat([rows, rows.head(1).assign(split="train")])
    with pytest.raises(ValueError, match=str(rows["image_id"].iloc[0])):
        encoding_items(leaked, root)


def test_a_killed_encoding_continues_to_the_same_bytes(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    run(corpus, autoencoder, tmp_path / "work-a", tmp_path / "a")
    context = multiprocessing.get_context("fork")
    for wait_s in (0.05, 0.12):
        child = context.Process(
            target=run, args=(corpus, autoencoder, tmp_path / "work-b", tmp_path / "b")
        )
        child.start()
        time.sleep(wait_s)
        child.kill()
        child.join()
    run(corpus, autoencoder, tmp_path / "work-b", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_plan_does_not_inherit_stored_images(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    root, rows = corpus
    run((root, rows), autoencoder, tmp_path / "work", tmp_path / "out")
    run((root, rows.head(4)), autoencoder, tmp_path / "work", tmp_path / "out")
    index = pd.read_parquet(tmp_path / "out" / "index.parquet")
    assert sorted(index["image_id"]) == sorted(rows["image_id"].head(4))
    assert {path.name for path in (tmp_path / "out").glob("*.bin")} == set(index["shard"])


def test_band_energy_shares_sum_to_one_and_natural_latents_are_mostly_smooth(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    root, rows = corpus
    store = encode_corpus(
        encoding_items(rows, root),
        autoencoder,
        SETTINGS,
        work_dir=tmp_path / "work",
        destination=tmp_path / "out",
    )
    shares = band_energy_shares(store)
    assert np.allclose(shares[["ll", "lh", "hl", "hh"]].sum(axis=1), 1.0)
    assert shares["ll"].mean() > 0.25


def test_an_image_fills_its_bucket(corpus: tuple[Path, pd.DataFrame]) -> None:
    root, rows = corpus
    item = EncodingItem("x", "train", root / str(rows["uri"].iloc[0]), Bucket(64, 128))
    image = load_image(item)
    assert image.shape == (3, 64, 128)
    assert -1.0 <= float(image.min()) < float(image.max()) <= 1.0
