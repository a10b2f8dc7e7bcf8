from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.images.aspect_buckets import Bucket
from components.images.decoding import ImageUndecodable
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.settings.schema import load_settings
from components.settings.training import LatentsSettings
from components.training.encoding.latents import decode, encode, encode_corpus, encoding_items
from components.training.encoding.training_view import TrainingViews, random_rows

ROOT = Path(__file__).resolve().parents[4]
SETTINGS = load_settings(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """One photograph with a latent, under the committed settings."""
    root = tmp_path_factory.mktemp("project")
    pixels = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 220)).save(root / "a.png")
    digest = hashlib.sha256((root / "a.png").read_bytes()).hexdigest()
    rows = pd.DataFrame(
        [{"image_id": digest, "uri": "a.png", "split": "train", "bucket_height": 96}]
    ).assign(bucket_width=128)
    vae = load_base_autoencoder(SETTINGS.models.autoencoder, SETTINGS.project.seed)
    encode_corpus(
        encoding_items(rows, root),
        vae,
        LatentsSettings(batch_size=1, dtype="float32", shard_mb=1),
        work_dir=root / "work",
        destination=root / "data" / "latents",
    )
    return root, rows


def test_a_latent_is_shown_through_the_base_decoder(project: tuple[Path, pd.DataFrame]) -> None:
    root, rows = project
    view = TrainingViews(SETTINGS, root).of_row(rows.iloc[0])
    assert view.bucket == Bucket(96, 128)
    vae = load_base_autoencoder(SETTINGS.models.autoencoder, SETTINGS.project.seed)
    image = torch.from_numpy(view.crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        direct = vae.decode(vae.encode(image).latent_dist.mode()).sample[0]
    expected = ((direct.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
    assert view.latent is not None
    assert np.abs(view.latent - expected).max() < 1
    assert "latent decoded" in view.described()
    torch.testing.assert_close(decode(vae, encode(vae, image))[0], direct, atol=1e-4, rtol=1e-4)


def test_a_file_without_a_row_gets_the_nearest_bucket_and_its_latent_by_its_bytes(
    project: tuple[Path, pd.DataFrame],
) -> None:
    root, _ = project
    view = TrainingViews(SETTINGS, root).of_file(root / "a.png")
    assert view.latent is not None
    assert view.crop.shape == (view.bucket.height, view.bucket.width, 3)
    assert view.bucket.width > view.bucket.height


def test_a_pipe_is_no_photograph_whether_it_has_a_row_or_not(
    project: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    # Nobody writes to it: who opened it as a file would wait for ever.
    os.mkfifo(tmp_path / "pipe.png")
    rows = pd.DataFrame([{"image_id": "0" * 64, "uri": "pipe.png", "bucket_height": None}])
    views = TrainingViews(SETTINGS, tmp_path)
    for look in (lambda: views.of_file(tmp_path / "pipe.png"), lambda: views.of_row(rows.iloc[0])):
        with pytest.raises(ImageUndecodable, match="not a regular file"):
            look()


def test_latents_of_another_autoencoder_are_not_shown(project: tuple[Path, pd.DataFrame]) -> None:
    root, rows = project
    other = SETTINGS.model_copy(
        update={"project": SETTINGS.project.model_copy(update={"seed": SETTINGS.project.seed + 1})}
    )
    with pytest.raises(ValueError, match="another autoencoder"):
        TrainingViews(other, root).of_row(rows.iloc[0])


def test_random_rows_are_usable_distinct_and_the_same_for_a_seed() -> None:
    table = pd.DataFrame({"image_id": [f"{n // 2}" for n in range(40)], "uri": range(40)})
    table = table.assign(integrity=["ok", "ok", "broken", "ok"] * 10, kept=None)
    rows = random_rows(table, 7, seed=1)
    assert len(rows) == 7
    assert rows["image_id"].is_unique
    assert rows["integrity"].eq("ok").all()
    pd.testing.assert_frame_equal(rows, random_rows(table, 7, seed=1))
    assert rows["uri"].tolist() != random_rows(table, 7, seed=2)["uri"].tolist()
    table["kept"] = [n < 8 for n in range(40)]
    assert set(random_rows(table, 7, seed=1)["uri"]) <= set(range(8))
