"""Stage `evaluate`: reconstruction fidelity, weight-free image metrics, and the report page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image

from components.corpus.decoding import read_rgb
from components.corpus.original_lookup import OriginalLookup
from components.evaluation import gate, scores
from components.evaluation.reconstruction import fidelity_metrics, reconstruct
from components.evaluation.report import build_report
from components.evaluation.texture import texture_metrics
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.base_autoencoder import load_base_autoencoder
from components.progress import track
from components.training.aspect_buckets import Bucket, fit_to_bucket
from flows.stages.baseline import baseline_scores
from flows.stages.contract import StageContext, StageFailed, StageResult

ImageArray = npt.NDArray[np.uint8]


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
    temporary = out / ".scores.parquet"
    table.to_parquet(temporary, index=False)
    temporary.replace(paths["scores.parquet"])
    _write(paths["metrics.json"], json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    _write(paths["report.html"], page)
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


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _fitted(image: Image.Image, size: tuple[int, int]) -> ImageArray:
    """The photograph at (height, width), resized to cover and cropped as in training."""
    return np.asarray(fit_to_bucket(image, Bucket(*size)))


def _photograph_scores(context: StageContext, held_out: pd.DataFrame) -> Iterator[scores.Score]:
    """Reconstructions at bucket size, and photographs at the generated sizes for reference."""
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
    limit = settings.evaluate.reconstruction_images
    megapixels = settings.ingest.max_megapixels
    try:
        originals = OriginalLookup(context.root).find_all(held_out)
    except ValueError as problem:
        raise StageFailed(f"evaluate: {problem}") from None
    rows = zip(held_out.to_dict("records"), originals, strict=True)
    for index, (row, original) in enumerate(
        track(rows, "evaluate photographs", total=len(originals))
    ):
        photograph = Image.fromarray(read_rgb(original, max_megapixels=megapixels).pixels)
        if index < limit:
            size = (int(row["bucket_height"]), int(row["bucket_width"]))
            reference = _fitted(photograph, size)
            for system, autoencoder in systems:
                values = fidelity_metrics(reference, reconstruct(autoencoder, reference))
                yield from scores.image_scores(row["image_id"], system, size, values)
        for size in settings.generate.sizes:
            values = texture_metrics(_fitted(photograph, size))
            yield from scores.image_scores(row["image_id"], scores.PHOTOGRAPHS, size, values)


def _generations(context: StageContext) -> list[dict[str, Any]]:
    log = context.input("generate", "generations.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _generated_scores(context: StageContext) -> Iterator[scores.Score]:
    for record in track(_generations(context), "evaluate images"):
        with Image.open(context.input("generate", "images", record["file"])) as image:
            rgb = np.asarray(image.convert("RGB"))
        size = (int(record["height"]), int(record["width"]))
        yield from scores.image_scores(record["file"], scores.GENERATED, size, texture_metrics(rgb))


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
