"""Encoding a corpus: normalisation, one bucket a batch, resumption with the same bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.engine.ordered_pool import Failure
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.pixel_range import to_pixels
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder
from components.models.tiny import build_tiny_autoencoder, synthetic_images
from components.settings.models import AutoencoderSettings, TinyAutoencoder
from components.settings.training import LatentsSettings
from components.training.encoding.encoder_workers import Placement
from components.training.encoding.latent_summary import band_energy_shares
from components.training.encoding.latent_workers import LatentJob
from components.training.encoding.latents import (
    EncodedBatch,
    EncodingItem,
    Posterior,
    TooManyRejected,
    batches,
    encode,
    encode_batch,
    encode_corpus,
    encoding_items,
    load_image,
    plan_digest,
)
from components.training.stores.latent_store import LatentStore

ROOT = Path(__file__).resolve().parents[4]
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


def test_a_drawn_latent_is_mean_plus_spread_times_noise_of_its_image_and_bucket(
    corpus: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    vae = build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
    # The tiny encoder is certain; one that is not, by a spread that differs from place to place.
    with torch.no_grad():
        weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
        half = len(bias) // 2
        generator = torch.Generator().manual_seed(4)
        weight[half:] = 0.005 * torch.randn(weight[half:].shape, generator=generator)
        bias[half:] = -1.0
    items = encoding_items(corpus[1], corpus[0])
    stores = {}
    for name, size, seed in (("pairs", 2, 7), ("single", 1, 7), ("other", 2, 8), ("mean", 2, None)):
        stores[name] = encode_corpus(
            items,
            vae,
            SETTINGS.model_copy(update={"batch_size": size}),
            # One work folder: what another posterior left there is not gone on with.
            work_dir=tmp_path / "work",
            destination=tmp_path / name,
            posterior=Posterior(seed),
        )
    about = {name: store.about["provenance"]["posterior"] for name, store in stores.items()}
    assert about["pairs"] == "sample, seed 7"
    assert about["mean"] == "mode"
    for item in items:
        gaussian = vae.encode(load_image(item)[None]).latent_dist
        key = f"posterior/7/{item.image_id}/{item.bucket.name}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        noise = torch.randn(gaussian.mean.shape[1:], generator=torch.Generator().manual_seed(seed))
        raw = gaussian.mean[0] + (0.5 * gaussian.logvar[0]).exp() * noise
        expected = (raw - vae.config.shift_factor) * vae.config.scaling_factor
        for name in ("pairs", "single"):
            torch.testing.assert_close(
                stores[name].read(item.image_id), expected, atol=1e-5, rtol=1e-5
            )
        distance = (stores["mean"].read(item.image_id) - expected).std()
        assert distance > 0.2
        # Two draws lie a square root of two further apart than one lies from the mean.
        assert (stores["other"].read(item.image_id) - expected).std() > 1.2 * distance


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


def spoil(corpus: tuple[Path, pd.DataFrame], root: Path, number: int) -> pd.DataFrame:
    """A copy of the corpus whose photograph `number` is cut off."""
    shutil.copytree(corpus[0], root, dirs_exist_ok=True)
    path = root / str(corpus[1]["uri"].iloc[number])
    path.write_bytes(path.read_bytes()[:300])
    return corpus[1]


def test_a_photograph_that_cannot_be_decoded_is_left_out_and_listed(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    rows = spoil(corpus, tmp_path / "root", 4)
    store = encode_corpus(
        encoding_items(rows, tmp_path / "root"),
        autoencoder,
        SETTINGS.model_copy(update={"max_rejected_fraction": 0.2}),
        work_dir=tmp_path / "work",
        destination=tmp_path / "out",
    )
    bad = rows["image_id"].iloc[4]
    assert len(store) == 8
    assert bad not in store
    assert store.rejected == {bad}
    assert "4.png" in store.about["rejected"][0]["error"]


def test_more_rejected_photographs_than_allowed_end_the_encoding_with_the_first_reason(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    rows = spoil(corpus, tmp_path / "root", 4)
    with pytest.raises(TooManyRejected, match=r"1 of 9 photographs.*max_rejected_fraction.*4\.png"):
        run((tmp_path / "root", rows), autoencoder, tmp_path / "work", tmp_path / "out")


def test_a_batch_that_takes_its_worker_down_costs_only_the_culprit(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    root, rows = corpus
    culprit = rows["image_id"].iloc[4]

    def crashing(plan: Iterable[list[EncodingItem]]) -> Iterator[EncodedBatch | Failure]:
        for batch in plan:
            if culprit in {item.image_id for item in batch}:
                yield Failure("worker killed by SIGSEGV")
            else:
                yield encode_batch(batch, autoencoder, "float32")

    def encode_all(folder: Path) -> dict[str, bytes]:
        encode_corpus(
            encoding_items(rows, root),
            autoencoder,
            SETTINGS.model_copy(update={"max_rejected_fraction": 0.2}),
            work_dir=folder / "work",
            destination=folder / "out",
            workers=crashing,
        )
        return contents(folder / "out")

    first = encode_all(tmp_path / "a")
    store = LatentStore(tmp_path / "a" / "out")
    assert len(store) == 8
    assert store.about["rejected"] == [{"image_id": culprit, "error": "worker killed by SIGSEGV"}]
    assert encode_all(tmp_path / "a") == encode_all(tmp_path / "b") == first


def test_the_store_says_what_its_latents_came_from(
    corpus: tuple[Path, pd.DataFrame], autoencoder: AutoencoderKLF16, tmp_path: Path
) -> None:
    run(corpus, autoencoder, tmp_path / "work", tmp_path / "out")
    found = LatentStore(tmp_path / "out").about["provenance"]
    assert found["encoder_digest"] == encoder_digest(autoencoder)
    assert found["scaling_factor"] == autoencoder.config.scaling_factor
    assert found["encoder_dtype"] == "float32"
    assert found["software"]["torch"].startswith("2.")


KILLED = """
import pickle, sys
from pathlib import Path
from components.engine.ordered_pool import EngineLimits
from components.training.encoding.latents import encode_corpus
from components.training.encoding.latent_workers import latent_workers

if __name__ == "__main__":
    items, autoencoder, settings, job, folder = pickle.loads(Path(sys.argv[1]).read_bytes())
    limits = EngineLimits(workers=2, timeout_s=300, memory_mb=2**24, retries=1)
    encode_corpus(
        items, autoencoder, settings, work_dir=folder / "work", destination=folder / "out",
        workers=latent_workers(job, limits), posterior=job.posterior,
    )
"""


@pytest.mark.slow
def test_two_workers_killed_and_continued_write_the_bytes_of_one_process(
    corpus: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    tiny = TinyAutoencoder(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    chosen = AutoencoderSettings(pretrained=None, stride=2, decode_mode="aligned", tiny=tiny)
    autoencoder = load_base_autoencoder(chosen, seed=3)
    items = encoding_items(corpus[1], corpus[0])
    settings = SETTINGS.model_copy(update={"batch_size": 1})
    torch.set_num_threads(1)
    encode_corpus(
        items,
        autoencoder,
        settings,
        work_dir=tmp_path / "work",
        destination=tmp_path / "alone",
        posterior=Posterior(3),
    )
    job = LatentJob(
        posterior=Posterior(3),
        autoencoder=chosen,
        seed=3,
        root=str(corpus[0]),
        digest=encoder_digest(autoencoder),
        dtype="float32",
        max_megapixels=100.0,
        placement=Placement(device="cpu", threads=1, slots=None),
    )
    arguments = tmp_path / "arguments.pickle"
    arguments.write_bytes(pickle.dumps((items, autoencoder, settings, job, tmp_path)))
    script = tmp_path / "encode.py"
    script.write_text(KILLED)
    shutil.rmtree(tmp_path / "work")
    command = [sys.executable, str(script), str(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment)
    while killed.poll() is None:
        journals = list((tmp_path / "work").glob("*/journal.jsonl"))
        if journals and len(journals[0].read_text().splitlines()) > 2:
            killed.kill()
        time.sleep(0.002)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.parquet").exists()
    subprocess.run(command, env=environment, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
