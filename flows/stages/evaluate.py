"""Stage `evaluate`: reconstruction fidelity, weight-free image metrics, and the report page.

Pictures that were measured before, by the same protocols, are not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image

from components.evaluation.measuring.ledger import Ledger
from components.evaluation.measuring.measured_once import MeasuredOnce, Values, recipe_digest
from components.evaluation.measuring.reconstruction import (
    FIDELITY_IDS,
    fidelity_metrics,
    reconstruct,
)
from components.evaluation.pages.report import build_report
from components.evaluation.statistics import gate, scores
from components.files.weight_folders import file_digest
from components.files.whole_files import whole_file, write_text
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import read_rgb
from components.images.original_lookup import Original, OriginalLookup
from components.metrics.native.texture import TEXTURE_IDS, texture_metrics
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import autoencoder_digest, load_base_autoencoder
from components.telemetry.progress import track
from flows.stages.baseline import baseline_scores
from flows.stages.contract import StageContext, StageFailed, StageResult

ImageArray = npt.NDArray[np.uint8]

LEDGER = Path("runs", "ledger")
"""Shared with `ultraflux evaluate`; a cache of measurements, not an output of the stage."""


def run(context: StageContext) -> StageResult:
    """Write `data/evaluate/{scores.parquet, metrics.json, report.html}`."""
    settings = context.settings
    torch.set_num_threads(settings.runtime.torch_threads)
    held_out = pd.read_parquet(context.input("slices", "eval.parquet"))
    rows = [*_photograph_scores(context, held_out), *_generated_scores(context)]
    table = scores.scores_table(rows)
    metrics = scores.headline_metrics(
        table,
        resamples=settings.evaluate.bootstrap_resamples,
        seed=settings.project.seed,
    )
    metrics = dict(sorted((metrics | _validation_loss(context)).items()))
    digests: dict[str, str] = _generations(context)[0]["digests"]
    decision = gate.decide(
        metrics,
        settings.promote,
        digests,
        candidate=table,
        baseline=baseline_scores(context),
        seed=settings.project.seed,
    )
    page = build_report(context.root, settings, table=table, metrics=metrics, decision=decision)

    out = context.output_dir
    paths = {name: out / name for name in ("scores.parquet", "metrics.json", "report.html")}
    with whole_file(paths["scores.parquet"]) as temporary:
        table.to_parquet(temporary, index=False)
    write_text(paths["metrics.json"], json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    write_text(paths["report.html"], page)
    verdict = "gate passed" if decision["promoted"] else "gate not passed"
    gain = metrics.get("vae_psnr_gain_db")
    return StageResult(
        metrics=metrics,
        artifacts=(paths["report.html"], paths["metrics.json"]),
        datasets={"scores": paths["scores.parquet"]},
        tags={f"sha256.{name}": digest for name, digest in digests.items()},
        summary=f"{len(table)} scores, "
        + ("" if gain is None else f"autoencoder {gain:+.2f} dB, ")
        + verdict,
    )


def _fitted_digest(image_id: str, size: tuple[int, int]) -> str:
    """Stands for a photograph that was cut to (height, width)."""
    return recipe_digest("fitted/v1", image_id, *size)


class _Photograph:
    """One held-out photograph, decoded when a number of it is missing."""

    def __init__(self, original: Original, max_megapixels: float) -> None:
        self._original = original
        self._max_megapixels = max_megapixels

    @cached_property
    def _image(self) -> Image.Image:
        return Image.fromarray(read_rgb(self._original, max_megapixels=self._max_megapixels).pixels)

    def fitted(self, size: tuple[int, int]) -> ImageArray:
        """Resized to cover (height, width) and cropped as in training."""
        return np.asarray(fit_to_bucket(self._image, Bucket(*size)))

    def texture(self, size: tuple[int, int]) -> Values:
        """Its weight-free numbers at a size."""
        return texture_metrics(self.fitted(size))

    def reconstruction(self, autoencoder: AutoencoderKLF16, size: tuple[int, int]) -> Values:
        """Fidelity of an autoencoder's reconstruction at a size."""
        reference = self.fitted(size)
        return fidelity_metrics(reference, reconstruct(autoencoder, reference))


def _autoencoders(context: StageContext) -> list[tuple[str, AutoencoderKLF16, str]]:
    """(system, autoencoder on its device, digest) before and after post-training."""
    settings = context.settings
    device = settings.runtime.device
    before: AutoencoderKLF16 = load_base_autoencoder(
        settings.models.autoencoder, settings.project.seed, context.root
    ).to(device)
    after = AutoencoderKLF16.from_pretrained(
        context.input("vae", "autoencoder"), local_files_only=True
    )
    after = after.to(device).eval()
    systems = ((scores.RECONSTRUCTION_BEFORE, before), (scores.RECONSTRUCTION_AFTER, after))
    # The device: its rounding of sums decides an 8-bit level here and there.
    return [
        (name, model, recipe_digest("autoencoder/v1", autoencoder_digest(model), device))
        for name, model in systems
    ]


def _photograph_scores(context: StageContext, held_out: pd.DataFrame) -> Iterator[scores.Score]:
    """Reconstructions at bucket size, and photographs at the generated sizes for reference."""
    settings = context.settings
    try:
        originals = OriginalLookup(context.root).find_all(held_out)
    except ValueError as problem:
        raise StageFailed(f"evaluate: {problem}") from None
    systems = _autoencoders(context)
    buckets = list(zip(held_out["bucket_height"], held_out["bucket_width"], strict=True))
    # Per photograph: size, and (image, reference) of every system's reconstruction.
    reconstructed = []
    for original, (height, width) in zip(originals, buckets, strict=True):
        size = (int(height), int(width))
        reference = _fitted_digest(original.image_id, size)
        pairs = [(recipe_digest("reconstruction/v1", d, reference), reference) for *_, d in systems]
        reconstructed.append((size, pairs))
    del reconstructed[settings.evaluate.reconstruction_images :]
    sizes = settings.generate.sizes
    photographs = [(_fitted_digest(o.image_id, size), "") for o in originals for size in sizes]
    known = [*(pair for _, pairs in reconstructed for pair in pairs), *photographs]
    once = MeasuredOnce(Ledger(context.root / LEDGER), known, (*FIDELITY_IDS, *TEXTURE_IDS))
    for index, original in enumerate(track(originals, "evaluate photographs")):
        photograph, name = _Photograph(original, settings.ingest.max_megapixels), original.image_id
        if index < len(reconstructed):
            size, pairs = reconstructed[index]
            for (system, autoencoder, _), (image, reference) in zip(systems, pairs, strict=True):
                measure = partial(photograph.reconstruction, autoencoder, size)
                values = once.values(image, FIDELITY_IDS, measure, reference=reference)
                yield from scores.image_scores(name, system, size, values)
        for size in sizes:
            measure = partial(photograph.texture, size)
            values = once.values(_fitted_digest(name, size), TEXTURE_IDS, measure)
            yield from scores.image_scores(name, scores.PHOTOGRAPHS, size, values)
    once.close()


def _generations(context: StageContext) -> list[dict[str, Any]]:
    log = context.input("generate", "generations.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _generated_scores(context: StageContext) -> Iterator[scores.Score]:
    records = _generations(context)
    folder = context.input("generate", "images")
    digests = [file_digest(folder / record["file"]) for record in records]
    ledger = Ledger(context.root / LEDGER)
    once = MeasuredOnce(ledger, ((digest, "") for digest in digests), TEXTURE_IDS)
    for record, digest in zip(track(records, "evaluate images"), digests, strict=True):
        size = (int(record["height"]), int(record["width"]))
        values = once.values(digest, TEXTURE_IDS, partial(_texture_of, folder / record["file"]))
        yield from scores.image_scores(
            record["file"], scores.GENERATED, size, values, record["prompt"]
        )
    once.close()


def _texture_of(path: Path) -> Values:
    with Image.open(path) as image:
        return texture_metrics(np.asarray(image.convert("RGB")))


def _validation_loss(context: StageContext) -> dict[str, float]:
    """First value before stage 1, last value after stage 2, and the relative fall between them."""
    first = _stage_metrics(context, "dit_stage1")["validation_loss_first"]
    last = _stage_metrics(context, "dit_stage2")["validation_loss_last"]
    return {
        "validation_loss_first": float(first),
        "validation_loss_last": float(last),
        "validation_loss_drop": 1.0 - float(last) / float(first),
    }


def _stage_metrics(context: StageContext, stage: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        context.input(stage, "metrics.json").read_text(encoding="utf-8")
    )
    return values
