"""Model card of exported weights: a README.md whose YAML front matter a model hub understands.

The card says what the weights are, from what and how they were trained, and how well they predict
held-out images. It holds no date, path, host or commit: equal weights have equal cards, so a new
commit does not make every later stage run again (the commit stands in the tracked run).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.files.safetensors_header import SPEC
from components.files.weight_folders import weights_checksums, weights_identity
from components.models.backbones import backbone_of_config
from components.settings.effects import effect
from components.settings.section import Effect
from components.training.adapters.adapter_files import (
    ADAPTER_FILE,
    ARCHITECTURES,
    BASE_SHA256,
    BASE_TITLE,
    STAGES,
)
from components.training.adapters.base_rounding import BaseRounding, noted_rounding
from components.training.distributed.divergence import DivergenceEvent
from components.training.distributed.optimizers import described_optimizer
from components.training.distributed.ranks import described_determinism
from components.training.distributed.run_states import described
from components.training.dit.adapters import adapter_base
from components.training.dit.batch_plan import BatchPlan
from components.training.dit.curriculum import trained_span
from components.training.dit.validation import NOISE_LEVELS, ValidationLoss
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

if TYPE_CHECKING:
    from components.training.dit.job import DitJob

_TITLES = {"raw": "trained weights", "ema": "exponential moving average of the weights"}


@dataclass(frozen=True)
class TrainingFacts:
    """What the trainer knows about a finished run."""

    images: int
    """Training images."""
    plan_digest: str
    """Of the images trained on, their buckets and the batch size."""
    latents_digest: str
    texts_digest: str
    autoencoder_digest: str
    """Of the encoder that made the latents."""
    text_encoder_digest: str
    noise_levels: tuple[float, float]
    """(lowest, highest) level trained on."""
    started_from: str
    """Identity of the initial weights; empty for random ones."""
    resolution: str
    """WIDTHxHEIGHT in pixels of the bucket with the most of them."""
    validation: Mapping[str, ValidationLoss]
    """Last losses on held-out images by weights, and those before training as "start"."""
    divergences: tuple[str, ...] = ()
    """A line for each step whose update was refused."""
    rounding: BaseRounding | None = None
    """What rounding the frozen base changed; None: it was not rounded."""


def facts_of_run(
    job: DitJob,
    plan: BatchPlan,
    latents: LatentStore,
    texts: TextStore,
    rows: Iterable[Mapping[str, float]],
    events: Iterable[DivergenceEvent] = (),
) -> TrainingFacts:
    """Facts of a run whose metric log has `rows`, and whose guard noted `events`."""
    return TrainingFacts(
        images=len(plan),
        plan_digest=plan.index_digest,
        latents_digest=latents.digest,
        texts_digest=texts.digest,
        autoencoder_digest=str(latents.index["encoder_digest"].iloc[0]),
        text_encoder_digest=str(texts.index["encoder_digest"].iloc[0]),
        noise_levels=trained_span(job.settings, latents.index),
        started_from=initial_identity(job.initial_weights),
        resolution=_largest(latents),
        validation=last_validation(rows),
        divergences=tuple(map(str, events)),
        rounding=None if job.transformer.quantisation == "none" else noted_rounding(job.state_dir),
    )


def _largest(latents: LatentStore) -> str:
    index = latents.index
    place = int((index["latent_h"] * index["latent_w"]).to_numpy().argmax())
    height, width = str(index["bucket"].iloc[place]).split("x")
    return f"{width}x{height}"


def file_metadata(job: DitJob, facts: TrainingFacts, weights: str) -> dict[str, str]:
    """ModelSpec entries of whole weights that a stage exports; without a date, as all of its files.

    Args:
        job: settings of the run.
        facts: what it found.
        weights: "raw" or "ema".
    """
    backbone, card = job.transformer.backbone, job.transformer.card
    about = {
        **SPEC,
        "modelspec.architecture": ARCHITECTURES.get(backbone, backbone),
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"UltraFlux {job.name} {weights}",
        "modelspec.license": card.license_name or card.license,
        "modelspec.tags": ", ".join(("ultraflux", backbone)),
        "modelspec.resolution": facts.resolution,
        "ultraflux.backbone": backbone,
    }
    if card.base_model is not None:
        about[BASE_TITLE] = card.base_model
    if facts.started_from:
        about[BASE_SHA256] = facts.started_from
    return about


def initial_identity(folder: Path | None) -> str:
    """Identity of the weights that training starts from; empty for random ones."""
    return "" if folder is None else weights_identity(weights_checksums(folder))


def last_validation(rows: Iterable[Mapping[str, float]]) -> dict[str, ValidationLoss]:
    """Last validation losses of "raw" and "ema", and the first as "start", from a metric log."""
    found: dict[str, ValidationLoss] = {}
    for row in rows:
        if "validation_loss" in row:
            losses = ValidationLoss.from_metrics(row)
            # The first row wins: it is the validation before step 1, of the weights that were
            # given.
            found.setdefault("start", losses)
            found["raw"] = losses
        if "validation_loss_ema" in row:
            found["ema"] = ValidationLoss.from_metrics(row, "_ema")
    return found


def settings_digest(job: DitJob) -> str:
    """Sha256 of the settings that decide the weights (folders and progress pictures do not)."""
    values = {
        "objective": job.objective.model_dump(mode="json"),
        "seed": job.seed,
        # Intervals, pictures and retention change no weight (one rule: `settings.effects`).
        "stage": {
            key: value
            # What is left at its default says nothing new: cards of before such a setting stay.
            for key, value in job.settings.model_dump(
                mode="json", exclude_defaults=True, exclude={"adapter": {"trigger"}}
            ).items()
            if effect(f"dit_stage1.{key}") is not Effect.NONE
        },
        # Where weights lie, and what a card says of their licence, changes no value of them; what
        # they are is told by `initial_weights` beside this digest.
        "transformer": _deciding_transformer(job),
    }
    # Sorted, so that the order of fields in the settings does not matter.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _deciding_transformer(job: DitJob) -> dict[str, Any]:
    values = job.transformer.model_dump(mode="json", exclude={"pretrained", "card"})
    # Unrounded is what all weights were before there was the choice: their digests stay.
    if values["quantisation"] == "none":
        del values["quantisation"]
    return values


def model_card(
    job: DitJob, facts: TrainingFacts, weights: str, config: Mapping[str, Any], checksums: str
) -> str:
    """Markdown with front matter.

    Args:
        job: settings of the run.
        facts: what it found.
        weights: "raw" or "ema".
        config: of the transformer.
        checksums: of the weight files (`weights_checksums`).
    """
    # In the order written, which is the order in which people read it.
    front = yaml.safe_dump(
        _front_matter(job, facts, weights, config, checksums), sort_keys=False, width=100
    )
    sections = [
        f"---\n{front}---\n",
        f"# UltraFlux: {job.name}, {_TITLES[weights]}\n",
        _summary(job, facts, config),
        *_segments(job),
        *_adapter(job, facts),
        *_rounding(facts),
        *_divergences(facts),
        "## Validation\n",
        _validation_table(facts.validation, weights),
        "## Use\n",
        # From the configuration of these weights, so that the card fits what lies beside it.
        backbone_of_config(config).usage(config) + "\n",
        "## Files\n",
        "`sha256sum -c weights.sha256` checks the weights.\n",
    ]
    return "\n".join(sections)


def _front_matter(
    job: DitJob, facts: TrainingFacts, weights: str, config: Mapping[str, Any], checksums: str
) -> dict[str, Any]:
    card, settings = job.transformer.card, job.settings
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["license"] = card.license
    if card.license_name is not None:
        front["license_name"] = card.license_name
    if card.base_model is not None:
        front["base_model"] = card.base_model
    front["tags"] = ["ultraflux", job.transformer.backbone]
    front["ultraflux"] = {
        "stage": job.name,
        "weights": weights,
        "steps": settings.steps,
        "global_batch_size": settings.global_batch_size,
        "images": facts.images,
        "seed": job.seed,
        "objective": job.objective.kind,
        "optimizer": described_optimizer(settings),
        "determinism": described_determinism(job.runtime),
        "sigma_range": list(facts.noise_levels),
        # A backbone without the resonance embedding has no such entries.
        **{key: config[key] for key in ("rope_variant", "rope_window") if key in config},
        "validation_loss": _rounded(facts.validation[weights].mean),
        "digests": {
            "weights": weights_identity(checksums),
            # Null for random weights: an empty string could pass for a digest.
            "initial_weights": facts.started_from or None,
            "settings": settings_digest(job),
            "training_images": facts.plan_digest,
            "latents": facts.latents_digest,
            "text_embeddings": facts.texts_digest,
            "autoencoder_encoder": facts.autoencoder_digest,
            "text_encoders": facts.text_encoder_digest,
        },
    }
    return front


def _summary(job: DitJob, facts: TrainingFacts, config: Mapping[str, Any]) -> str:
    settings = job.settings
    low, high = facts.noise_levels
    shift = "" if settings.timestep_shift == 1.0 else f", shift {settings.timestep_shift}"
    density = f"{settings.timestep_density}{shift}).{_dropout(settings.caption_dropout)}"
    start = "given weights" if facts.started_from else "random weights"
    rope = f", RoPE `{config['rope_variant']}`" if "rope_variant" in config else ""
    return (
        f"A {job.transformer.backbone} transformer{rope}, trained from {start} for "
        f"{settings.steps} steps of {settings.global_batch_size} images ({facts.images} different "
        f"ones) with the objective `{job.objective.kind}` at noise levels {low:g} to {high:g} "
        f"({density} {described_optimizer(settings)}, learning rate "
        f"{settings.learning_rate:g} ({settings.schedule}), {settings.precision} with float32 "
        f"masters, average with decay "
        f"{settings.ema_decay:g}. The digests above name data, settings and weights.\n"
    )


def _dropout(rate: float) -> str:
    return f" The empty prompt replaced {rate:.3g} of the captions." if rate else ""


def _segments(job: DitJob) -> list[str]:
    """Which steps ran under which conditions, where these changed under way."""
    if len(job.segments) < 2:
        return []
    ends = [segment.from_step for segment in job.segments[1:]] + [job.settings.steps]
    rows = [
        f"| {segment.from_step + 1} to {end} | {described(segment.changes) or 'as begun'} |"
        for segment, end in zip(job.segments, ends, strict=True)
    ]
    return [
        "## Segments\n",
        "Settings or data changed under way; the rest of this card speaks of the last steps.\n",
        "\n".join(["| steps | changed |", "|---|---|", *rows]) + "\n",
    ]


def _adapter(job: DitJob, facts: TrainingFacts) -> list[str]:
    """What the adapter file beside the weights belongs to."""
    if job.settings.adapter is None:
        return []
    base = adapter_base(job, facts.started_from)
    stages = "" if base.before is None else f" It holds {base.before.about[STAGES]}, too."
    name = f"`{base.sha256}`" if base.sha256 else "none"
    return [
        "## Adapter\n",
        f"`{ADAPTER_FILE}` is the change from **{base.title}** to these weights in low rank; stock "
        f"diffusers loads it on that base (`load_lora_weights`).{stages} The base's digest is "
        f"{name}: `sha256sum *.safetensors | sha256sum` in its transformer folder. `ultraflux "
        "weights adapter` writes it in ComfyUI's names, or of a smaller rank.\n",
    ]


def _rounding(facts: TrainingFacts) -> list[str]:
    """What the adapter saw of its base, where that was rounded."""
    if facts.rounding is None:
        return []
    return ["## Rounded base\n", facts.rounding.described()]


def _divergences(facts: TrainingFacts) -> list[str]:
    """Batches that were not trained on, where there are any."""
    if not facts.divergences:
        return []
    lines = "".join(f"- {line}\n" for line in facts.divergences)
    return ["## Left out\n", f"Updates that the guard against divergence refused:\n\n{lines}"]


def _validation_table(validation: Mapping[str, ValidationLoss], weights: str) -> str:
    # Both columns have the same images and noise, so a row compares weights alone.
    start, last = validation["start"], validation[weights]
    lines = [
        "Velocity error ||v - (eps - z)||^2 / N on held-out images with fixed noise.\n",
        "| noise level t | before training | these weights |",
        "|---:|---:|---:|",
        *(
            f"| {level:g} | {a:.4f} | {b:.4f} |"
            for level, a, b in zip(NOISE_LEVELS, start.velocity, last.velocity, strict=True)
        ),
        f"| mean | {start.mean:.4f} | {last.mean:.4f} |\n",
    ]
    return "\n".join(lines)


def _rounded(value: float) -> float:
    # For people; validation.csv has all digits.
    return float(f"{value:.6g}")
