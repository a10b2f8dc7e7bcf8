"""Encode a corpus with the base autoencoder into a latent store.

The plan (which images share a batch) is a pure function of the rows, so a run that was killed
continues with the same batches and ends with the same bytes. Who encodes is left open: this
process, or workers (`components.training.encoding.encoder_workers`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, tee
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from components.engine.ordered_pool import Failure
from components.engine.read_ahead import read_ahead
from components.images.arrays import ImageArray
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import MAX_MEGAPIXELS, ByteSource, ImageUndecodable, read_rgb
from components.images.original_lookup import Original, OriginalLookup
from components.images.pixel_range import to_model
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import encoder_digest
from components.settings.training import LatentsSettings
from components.telemetry.progress import track
from components.training.stores.latent_store import LatentStore, LatentStoreWriter
from components.training.stores.stored_tensors import StoreDtype, to_record


@dataclass(frozen=True)
class EncodingItem:
    """One image to encode."""

    image_id: str
    split: str
    path: Path | Original
    bucket: Bucket


def encoding_items(rows: pd.DataFrame, root: Path) -> list[EncodingItem]:
    """Rows of the manifest as items, each image once, ordered by bucket and image id.

    Args:
        rows: columns image_id, split, uri, bucket_height, bucket_width.
        root: repository; see `OriginalLookup`.

    Raises:
        ValueError: an image appears with two splits, or an original is missing.
    """
    # By both, so that an image with two splits is still seen below: it would be trained and tested
    # on.
    unique = rows.drop_duplicates(["image_id", "split"])
    repeated = unique.loc[unique["image_id"].duplicated(), "image_id"]
    if len(repeated):
        raise ValueError(
            f"image {repeated.iloc[0]} is in more than one split; make the slices again"
        )
    originals = OriginalLookup(root).find_all(unique)
    items = [
        EncodingItem(
            row["image_id"],
            row["split"],
            original,
            Bucket(int(row["bucket_height"]), int(row["bucket_width"])),
        )
        for row, original in zip(unique.to_dict("records"), originals, strict=True)
    ]
    # The order decides batches and places in the shards, so it may not depend on the table's.
    return sorted(items, key=lambda item: (item.bucket, item.image_id))


def batches(items: Iterable[EncodingItem], batch_size: int) -> list[list[EncodingItem]]:
    """Consecutive batches that never mix buckets."""
    plan = []
    # Items are sorted by bucket; `groupby` joins neighbours only.
    for _, group in groupby(items, key=lambda item: item.bucket):
        members = list(group)
        plan += [members[at : at + batch_size] for at in range(0, len(members), batch_size)]
    return plan


@dataclass(frozen=True)
class Posterior:
    """What is kept of the encoder's Gaussian N(mean, std^2) of an image."""

    seed: int | None = None
    """None: the mean, so that equal photographs have equal latents without a seed; else one draw
    mean + std * noise, the noise keyed by (seed, image, bucket)."""

    @classmethod
    def of(cls, settings: LatentsSettings, seed: int) -> Posterior:
        """Of the settings and the project's seed."""
        return cls(seed if settings.posterior == "sample" else None)

    def noise(self, item: EncodingItem, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of one image, float32 on the CPU."""
        # Of image and bucket alone, so that neither batch nor worker changes anything.
        key = f"posterior/{self.seed}/{item.image_id}/{item.bucket.name}"
        number = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu")
        generator.manual_seed(int.from_bytes(number, "little", signed=True))
        return torch.randn(shape, generator=generator, dtype=torch.float32)


MEAN = Posterior()
DECODERS = 2
"""Threads that decode ahead of the encoder. 21 photographs to 512 px on two cores, beside one of
torch: 3.36 s with one, 2.84 with two, 3.11 with four."""


def plan_digest(plan: Sequence[Sequence[EncodingItem]], posterior: Posterior = MEAN) -> str:
    """Sha256 of which images are encoded, at which size, in which batches, and what is kept."""
    # The bucket's name and not the path: a photograph that has moved is the same photograph.
    content = [[(item.image_id, item.split, item.bucket.name) for item in part] for part in plan]
    # How pixels are read, too: unfinished work of another reading is not continued.
    drawn = [] if posterior.seed is None else [f"drawn {posterior.seed}"]
    return hashlib.sha256(json.dumps(["as seen", content, *drawn]).encode()).hexdigest()


@torch.no_grad()
def encode(
    autoencoder: AutoencoderKLF16,
    images_BCHW: Tensor,
    noise: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> Tensor:
    """Normalised latents (z - shift_factor) * scaling_factor of the posterior.

    Args:
        autoencoder: base autoencoder.
        images_BCHW: (B, 3, H, W) in [-1, 1], edges multiples of the spatial compression.
        noise: of a draw, given the latents' shape (B, C, h, w); None: the mean.

    Returns:
        (B, C, H/16, W/16) for F16, in the autoencoder's dtype.
    """
    if images_BCHW.device.type == "cpu":
        # The same values, and the convolutions take 8% (256 px) to 24% (1024 px) less time.
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    gaussian = autoencoder.encode(images_BCHW).latent_dist
    latents: Tensor = gaussian.mode()
    if noise is not None:
        latents = latents + gaussian.std * noise(tuple(latents.shape)).to(latents)
    return (latents - (autoencoder.config.shift_factor or 0.0)) * autoencoder.config.scaling_factor


@torch.no_grad()
def decode(autoencoder: AutoencoderKLF16, latents_BCHW: Tensor) -> Tensor:
    """Inverse of `encode` as far as the autoencoder goes, (B, 3, H, W) in about [-1, 1].

    Args:
        autoencoder: base autoencoder.
        latents_BCHW: normalised, on its device.
    """
    config = autoencoder.config
    raw = latents_BCHW / config.scaling_factor + (config.shift_factor or 0.0)
    images: Tensor = autoencoder.decode(raw).sample
    return images


def bucket_crop(
    path: ByteSource, bucket: Bucket, max_megapixels: float = MAX_MEGAPIXELS
) -> ImageArray:
    """What training sees of a photograph: as seen, resized to cover its bucket, centre kept.

    Raises:
        ImageUndecodable: no pixels can be had.
    """
    image = Image.fromarray(read_rgb(path, max_megapixels=max_megapixels).pixels)
    return np.asarray(fit_to_bucket(image, bucket))


def load_image(item: EncodingItem, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """The photograph's `bucket_crop`, (3, H, W) in [-1, 1]."""
    try:
        pixels = bucket_crop(item.path, item.bucket, max_megapixels)
    except ImageUndecodable as problem:
        raise ImageUndecodable(f"{item.path.name}: {problem}") from problem
    return to_model([pixels])[0]


@dataclass(frozen=True)
class EncodedBatch:
    """What the store keeps of a batch; travels between processes."""

    records: dict[str, bytes]
    """By image id, in batch order."""
    shape: tuple[int, ...]
    """(C, h, w) of every record."""
    rejected: dict[str, str]
    """Reason by image id, for photographs that cannot be encoded."""


Workers = Callable[[Iterable[list[EncodingItem]]], Iterator[EncodedBatch | Failure]]


class TooManyRejected(ValueError):
    """More photographs than the settings allow could not be encoded; one line."""


def encode_batch(
    items: Sequence[EncodingItem],
    autoencoder: AutoencoderKLF16,
    dtype: StoreDtype,
    max_megapixels: float = MAX_MEGAPIXELS,
    posterior: Posterior = MEAN,
) -> EncodedBatch:
    """Latents of photographs of one bucket; one that cannot be encoded costs only itself.

    Args:
        items: of one bucket.
        autoencoder: on the device that encodes.
        dtype: of the records.
        max_megapixels: bound on decoded photographs.
        posterior: what is kept of the encoder's Gaussian.
    """
    loaded = {item.image_id: load(item, max_megapixels) for item in items}
    return encode_loaded(items, loaded, autoencoder, dtype, posterior)


Loaded = Mapping[str, Tensor | ImageUndecodable]
"""Pixels (3, H, W) in [-1, 1] by image id, or why there are none."""


def load(item: EncodingItem, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor | ImageUndecodable:
    """`load_image`, or why it cannot; needs no network, and may run beside one in a thread."""
    try:
        # The same exception as everywhere: only what is wrong with this photograph is caught.
        return load_image(item, max_megapixels)
    except ImageUndecodable as problem:
        return problem


def encode_loaded(
    items: Sequence[EncodingItem],
    loaded: Loaded,
    autoencoder: AutoencoderKLF16,
    dtype: StoreDtype,
    posterior: Posterior = MEAN,
) -> EncodedBatch:
    """As `encode_batch`, of photographs that `load` has read."""
    images = {name: found for name, found in loaded.items() if isinstance(found, Tensor)}
    rejected = {name: str(found) for name, found in loaded.items() if name not in images}
    if not images:
        return EncodedBatch({}, (0, 0, 0), rejected)
    device = next(autoencoder.parameters()).device
    # Without those that failed: the others' sums may round as in a smaller batch.
    kept = [item for item in items if item.image_id in images]

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.stack([posterior.noise(item, shape[1:]) for item in kept])

    drawn = None if posterior.seed is None else noise
    latents = encode(autoencoder, torch.stack(list(images.values())).to(device), drawn)
    records: dict[str, bytes] = {}
    for image_id, latent in zip(images, latents.cpu(), strict=True):
        # A NaN in the store would show as a loss that is NaN, weeks later.
        if bool(torch.isfinite(latent).all()):
            records[image_id] = to_record(latent, dtype)
        else:
            rejected[image_id] = "its latent is not finite"
    return EncodedBatch(records, tuple(latents.shape[1:]), rejected)


def encode_corpus(
    items: Sequence[EncodingItem],
    autoencoder: AutoencoderKLF16,
    settings: LatentsSettings,
    *,
    work_dir: Path,
    destination: Path,
    device: str = "cpu",
    max_megapixels: float = MAX_MEGAPIXELS,
    workers: Workers | None = None,
    posterior: Posterior = MEAN,
) -> LatentStore:
    """Encode all items and publish the store; continues where a killed run stopped.

    Batches are appended in the order of the plan whoever encodes them, so the bytes do not depend
    on workers or kills. A batch that takes its worker down with it is tried again at the end, one
    photograph at a time, so that only the culprit is left out.

    Args:
        items: from `encoding_items`.
        autoencoder: base autoencoder, evaluation mode.
        settings: batch size, stored dtype, shard size, and how many photographs may fail.
        work_dir: state of unfinished work, private to this corpus and these settings.
        destination: folder of the finished store.
        device: where the encoder runs.
        max_megapixels: bound on decoded photographs.
        workers: encode batches elsewhere, results in order; None: in this process.
        posterior: what is kept of the encoder's Gaussian; workers have to know it, too.

    Raises:
        TooManyRejected: more photographs fail than `settings.max_rejected_fraction`.
    """

    def here(plan: Iterable[list[EncodingItem]]) -> Iterator[EncodedBatch | Failure]:
        # Inside the generator: with workers elsewhere this process never fills its own GPU.
        model = autoencoder.to(device)
        todo, items = tee(plan)
        decoded = read_ahead(
            partial(load, max_megapixels=max_megapixels),
            chain.from_iterable(items),
            threads=DECODERS,
            ahead=2 * settings.batch_size,
        )
        with closing(decoded):
            for batch in todo:
                loaded = {item.image_id: found for item, found in islice(decoded, len(batch))}
                yield encode_loaded(batch, loaded, model, settings.dtype, posterior)

    plan = batches(items, settings.batch_size)
    # Work under another plan is kept apart: other batches may round sums differently.
    digest = encoder_digest(autoencoder)
    writer = LatentStoreWriter(
        work_dir / plan_digest(plan, posterior)[:16],
        dtype=settings.dtype,
        shard_mb=settings.shard_mb,
        encoder_digest=digest,
    )
    rejected: dict[str, str] = {}
    # Rounded down: a fraction of a photograph allows none.
    allowed = int(settings.max_rejected_fraction * len(items))

    def reject(reasons: Mapping[str, str]) -> None:
        rejected.update(reasons)
        # At once, and not after days: a wrong path or a broken disk rejects nearly everything.
        if len(rejected) > allowed:
            first, reason = next(iter(rejected.items()))
            raise TooManyRejected(
                f"{len(rejected)} of {len(items)} photographs cannot be encoded, {allowed} may "
                f"(latents.max_rejected_fraction); first {first}: {reason}"
            )

    def take(todo: Sequence[list[EncodingItem]], done: int) -> list[EncodingItem]:
        """Append what can be encoded; images of batches that were lost as a whole come back."""
        lost: list[EncodingItem] = []
        results = (workers or here)(todo)
        shown = track(results, "latents", total=len(plan), initial=done)
        # Ends the workers too where a rejection leaves the loop.
        with closing(results):  # type: ignore[type-var]
            for batch, result in zip(todo, shown, strict=True):
                if isinstance(result, Failure):
                    # Which photograph took the worker down is not known: each gets a batch of its
                    # own later.
                    if len(batch) > 1:
                        lost += batch
                    else:
                        reject({batch[0].image_id: result.message})
                    continue
                bucket = batch[0].bucket
                # In the order of the plan, as are the records.
                kept = [(i.image_id, i.split) for i in batch if i.image_id in result.records]
                records = list(result.records.values())
                if kept:
                    hw = (bucket.height, bucket.width)
                    writer.append_records(hw, kept, result.shape, records)
                # After the batch is stored: when this ends the run, the good ones are kept.
                reject(result.rejected)
        return lost

    # Rejected photographs are not stored, so a continued run tries them again and counts anew.
    stored = writer.stored()
    # Part of a batch is stored where others of it were rejected, or encoded one by one.
    left = [[item for item in batch if item.image_id not in stored] for batch in plan]
    pending = [batch for batch in left if batch]
    lost = take(pending, len(plan) - len(pending)) if pending else []
    if lost:
        take([[item] for item in lost], len(plan) - len(lost))
    return writer.publish(destination, provenance(autoencoder, digest, device, posterior), rejected)


def provenance(
    autoencoder: AutoencoderKLF16, digest: str, device: str, posterior: Posterior = MEAN
) -> dict[str, Any]:
    """What the latents came from: weights, normalisation, arithmetic, software."""
    config = autoencoder.config
    packages = ("torch", "diffusers", "numpy", "pillow", "simplejpeg")
    return {
        "encoder": type(autoencoder).__name__,
        "encoder_digest": digest,
        "encoder_dtype": str(next(autoencoder.parameters()).dtype).removeprefix("torch."),
        "stride": config.stride,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "posterior": "mode" if posterior.seed is None else f"sample, seed {posterior.seed}",
        "fit": "Lanczos until the bucket is covered, centre kept",
        "device": device,
        "software": {name: importlib.metadata.version(name) for name in packages},
    }
