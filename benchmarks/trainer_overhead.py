"""What the trainer adds to a bare training step of the same model on the same batches.

    python benchmarks/trainer_overhead.py [--steps 40] [--sizes embedded wider] [--zero-stage 0]

One real run of `DitTrainer` (float32, one process, synthetic stores in a temporary folder). After
every step of the trainer the same batches are trained on twice more, in turn: by a copy of the
model in plain torch (forward, objective, backward, clipping, AdamW, average of the weights), and by
a second DeepSpeed engine alone. So every step gives one ratio to plain torch and one to the engine;
the medians are the result (goal: at most 1.05 of either). The trainer's step is everything from one
step's end to the next's: taking the batch, optimizing, gathering, averaging, metrics, progress.

The time is the CPU time of the training thread on one core, which other work on the machine hardly
changes. Loading runs in a thread beside it and is given apart. Validation, checkpoints and grids
are not part of a step.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from verdicts import Verdict, conclude

from components.objectives.objective import objective_loss
from components.settings.schema import parse_settings
from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.dit.assembly import assemble_run
from components.training.dit.job import DitJob, build_transformer
from components.training.dit.trainer import DitTrainer
from components.training.dit.velocity import NoisedBatch, predict_velocity
from components.training.sharded.engine import initialize_engine
from components.training.stores.latent_store import LatentStoreWriter
from components.training.stores.text_store import build_text_store, embedded_prompts

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 8
SIZES: dict[str, dict[str, Any]] = {
    "embedded": {},
    "wider": {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 6,
        "axes_dims_rope": [16, 24, 24],
    },
}
TEXT_TOKENS, TEXT_WIDTH = 64, 64


def write_stores(folder: Path) -> None:
    """Latents of 256 x 256 images (16 to train on, 2 held out) and random text embeddings."""
    generator = torch.Generator().manual_seed(0)
    writer = LatentStoreWriter(
        folder / "work", dtype="float32", shard_mb=64, encoder_digest="random"
    )
    names = [f"image{number:02d}" for number in range(18)]
    for number, name in enumerate(names):
        latent = torch.randn(1, 16, 16, 16, generator=generator)
        writer.append((256, 256), [(name, "eval" if number < 2 else "train")], latent)
    writer.publish(folder / "latents")

    def embed(plan: Any) -> Iterator[Any]:
        def draw(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            count = len(prompts)
            return (
                torch.randn(count, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
                torch.randn(count, TEXT_WIDTH, generator=generator),
            )

        return (embedded_prompts(prompts, draw, "float32") for prompts in plan)

    build_text_store(
        folder / "embedding",
        folder / "texts",
        {name: f"caption of {name}" for name in names},
        embed,
        encoder_digest="random",
        dtype="float32",
    )


def make_job(folder: Path, size: str, steps: int, zero_stage: int = 2) -> DitJob:
    """A run of `steps` steps that only trains; batch and settings of the committed params.yaml."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["transformer"]["tiny"].update(SIZES[size])
    values["dit_stage1"].update(steps=steps, precision="fp32", validation_repeats=1)
    values["dit_stage1"].update(validate_every=steps, checkpoint_every=steps, zero_stage=zero_stage)
    settings = parse_settings(values)
    return DitJob(
        name=size,
        settings=settings.dit_stage1,
        objective=settings.objective,
        transformer=settings.models.transformer,
        runtime=settings.runtime.model_copy(update={"torch_threads": 1, "processes": 1}),
        seed=0,
        latents=folder / "latents",
        texts=folder / "texts",
        train_slice=None,
        autoencoder=None,
        initial_weights=None,
        state_dir=folder / size / "state",
        export_dir=folder / size / "export",
        metrics=folder / size / "metrics.jsonl",
    )


class BareTorch:
    """The loop that a notebook would have."""

    def __init__(self, job: DitJob, model: torch.nn.Module) -> None:
        self._job, self._model = job, model.train()
        settings = job.settings
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self, batches: list[NoisedBatch]) -> None:
        """One optimizer step."""
        job = self._job
        for batch in batches:
            velocity = predict_velocity(
                self._model, batch, job.settings.guidance_scale, torch.float32
            )
            (
                objective_loss(job.objective, velocity, batch.latents, batch.noise, batch.t).mean()
                / len(batches)
            ).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), job.settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - job.settings.ema_decay)


class BareEngine:
    """DeepSpeed without the trainer around it."""

    def __init__(self, job: DitJob, model: torch.nn.Module, ranks: Ranks) -> None:
        self._job = job
        self._engine = initialize_engine(model.train(), job.settings, ranks)

    def step(self, batches: list[NoisedBatch]) -> None:
        """One optimizer step."""
        job = self._job
        for batch in batches:
            velocity = predict_velocity(
                self._engine, batch, job.settings.guidance_scale, torch.float32
            )
            self._engine.backward(
                objective_loss(job.objective, velocity, batch.latents, batch.noise, batch.t).mean()
            )
            self._engine.step()


class InterleavedTrainer(DitTrainer):
    """The real trainer, with the other loops' turns between its steps."""

    def __init__(self, job: DitJob, ranks: Ranks) -> None:
        super().__init__(assemble_run(job, ranks))
        data = self.parts.data
        others = [build_transformer(job, data.texts.widths, data.latent_channels) for _ in range(2)]
        self.turns: dict[str, Callable[[list[NoisedBatch]], None]] = {
            "torch": BareTorch(job, others[0]).step,
            "engine": BareEngine(job, others[1], ranks).step,
        }
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("trainer", "loading", *self.turns)
        }
        self._begun: float | None = None

    def _validate_and_save(self) -> None:
        if self._begun is not None:
            self.seconds["trainer"].append(time.thread_time() - self._begun)
            begun = time.thread_time()
            batches = self._load(self.step - 1)
            self.seconds["loading"].append(time.thread_time() - begun)
            for name in sorted(self.turns, reverse=bool(self.step % 2)):
                begun = time.thread_time()
                self.turns[name](batches)
                self.seconds[name].append(time.thread_time() - begun)
        self._begun = time.thread_time()


def report(size: str, trainer: InterleavedTrainer) -> list[Verdict]:
    """One block of lines; the trainer's ratios."""
    kept = {name: values[WARM_UP:] for name, values in trainer.seconds.items()}
    parameters = sum(p.numel() for p in trainer.engine.module.parameters())
    print(f"\n{size}: {parameters / 1e6:.2f}M parameters, {len(kept['trainer'])} steps")
    for name, values in kept.items():
        print(f"  {name:<8} {1000 * statistics.median(values):9.2f} ms")
    verdicts = []
    for name in trainer.turns:
        ratios = [a / b for a, b in zip(kept["trainer"], kept[name], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(ratios)
        print(f"  trainer / {name}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")
        # Single steps scatter: what a share of all steps keeps is within the spread.
        stage = trainer.settings.zero_stage
        title = f"trainer step, {size}, ZeRO {stage}: trainer / {name}"
        verdicts.append(Verdict(title, (low, median, high), 1.05))
    return verdicts


def main() -> int:
    """Print one block per size; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}, torch {torch.__version__}")
    verdicts: list[Verdict] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        deterministic_torch(1),
        open_ranks("cpu") as ranks,
    ):
        write_stores(Path(folder))
        for size in options.sizes:
            trainer = InterleavedTrainer(
                make_job(Path(folder), size, options.steps, options.zero_stage), ranks
            )
            trainer.run()
            trainer.parts.checkpoints.writer.close()
            verdicts += report(size, trainer)
    return conclude(verdicts)


if __name__ == "__main__":
    sys.exit(main())
