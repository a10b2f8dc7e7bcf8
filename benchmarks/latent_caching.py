"""Latents of photographs by `encode_corpus` against four plain loops, in alternation.

    python benchmarks/latent_caching.py [--side 512] [--rounds 5] [--repeat 2]

All use one batch plan, one tiny autoencoder in the true architecture and `--threads` threads of
torch. The loops decode as people do: PIL then encode, simplejpeg then encode, a DataLoader of two
worker processes, two decoding threads ahead of the encoder; they keep each latent by `torch.save`
and check, journal and hash nothing. The photographs are those of data/sample, each `--repeat`
times. A ratio is of two times of one round: of ours, and of the fastest loop.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg
import torch
from folder_ways import over_fastest, seconds_in_alternation
from PIL import Image, ImageOps
from verdicts import Verdict, conclude

from components.files.weight_folders import file_digest
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.tiny import build_tiny_autoencoder
from components.settings.schema import load_settings
from components.training.distributed.ranks import deterministic_torch
from components.training.encoding.latents import (
    EncodingItem,
    batches,
    encode,
    encode_corpus,
    encoding_items,
)

ROOT = Path(__file__).resolve().parents[1]
Decode = Callable[[Path], Image.Image]


def corpus(folder: Path, side: int, repeat: int) -> list[EncodingItem]:
    """Photographs of the sample under `folder`, in square buckets of `side` px."""
    rows = []
    for source in sorted((ROOT / "data" / "sample").glob("*.jpg")):
        for number in range(repeat):
            path = folder / f"{source.stem}-{number}.jpg"
            shutil.copyfile(source, path)
            # Bytes behind the end marker, which no decoder reads, make it another photograph.
            path.write_bytes(path.read_bytes() + str(number).encode())
            rows.append(
                {
                    "image_id": file_digest(path),
                    "split": "train",
                    "uri": path.name,
                    "bucket_height": side,
                    "bucket_width": side,
                }
            )
    return encoding_items(pd.DataFrame(rows), folder)


def by_pil(path: Path) -> Image.Image:
    """As tutorials do."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def by_simplejpeg(path: Path) -> Image.Image:
    """libjpeg-turbo without PIL around it."""
    return Image.fromarray(simplejpeg.decode_jpeg(path.read_bytes(), "RGB"))


class Photographs(torch.utils.data.Dataset):
    """Batches of pixels, for a DataLoader."""

    def __init__(self, plan: list[list[tuple[Path, Bucket]]], decode: Decode) -> None:
        """Of the plan, decoded by `decode`."""
        self.plan = plan
        self.decode = decode

    def __len__(self) -> int:
        """Batches."""
        return len(self.plan)

    def __getitem__(self, number: int) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        pixels = [
            np.asarray(fit_to_bucket(self.decode(path), bucket))
            for path, bucket in self.plan[number]
        ]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1.0


def keep(
    loaded: Iterable[torch.Tensor],
    plan: list[list[EncodingItem]],
    model: AutoencoderKLF16,
    out: Path,
) -> None:
    """Encode batches as they come, a file a latent."""
    for items, images in zip(plan, loaded, strict=True):
        for item, latent in zip(items, encode(model, images), strict=True):
            torch.save(latent.clone(), out / f"{item.image_id}.pt")


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="bucket side, px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="times each photograph stands there")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    model = build_tiny_autoencoder().eval()
    settings = load_settings(ROOT / "params.yaml").latents.model_copy(update={"batch_size": 4})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        items = corpus(folder, options.side, options.repeat)
        plan = batches(items, settings.batch_size)
        paths = {file_digest(path): path for path in folder.glob("*.jpg")}
        read = [[(paths[item.image_id], item.bucket) for item in batch] for batch in plan]

        def ours(out: Path) -> None:
            encode_corpus(items, model, settings, work_dir=out / "work", destination=out / "store")

        def plain(decode: Decode) -> Callable[[Path], None]:
            data = Photographs(read, decode)
            return lambda out: keep((data[n] for n in range(len(data))), plan, model, out)

        def loader(out: Path) -> None:
            data = Photographs(read, by_simplejpeg)
            keep(
                torch.utils.data.DataLoader(data, batch_size=None, num_workers=2), plan, model, out
            )

        def threads(out: Path) -> None:
            data = Photographs(read, by_simplejpeg)
            with ThreadPoolExecutor(2) as pool:
                keep(pool.map(data.__getitem__, range(len(data))), plan, model, out)

        ways = {
            "encode_corpus": ours,
            "PIL loop": plain(by_pil),
            "simplejpeg loop": plain(by_simplejpeg),
            "DataLoader, 2 processes": loader,
            "2 threads ahead": threads,
        }
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"{len(items)} photographs to {options.side} px, {options.threads} threads of torch"
        )
        with deterministic_torch(options.threads):
            kept = seconds_in_alternation(ways, options.rounds, folder)
    for name, times in kept.items():
        print(f"{name:24} {len(items) / statistics.median(times):6.2f} photographs/s")
    ratios = over_fastest(kept, "encode_corpus")
    return conclude([Verdict("latents: time / fastest of four loops", ratios, 1.0)])


if __name__ == "__main__":
    sys.exit(main())
