"""Training of the DiT with DeepSpeed: one stage of SACL from its settings to exported weights.

`train` runs in every rank. A step is a pure function of (weights, optimizer state, step number):
the batch plan gives the samples, keyed generators give noise and levels. So a run that was killed
and resumed from a checkpoint ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.files.whole_files import write_text
from components.models.backbones import check_stores
from components.objectives.haar import BAND_NAMES
from components.objectives.objective import objective_loss
from components.settings.training import DitStageSettings
from components.telemetry.metric_log import MetricLog
from components.telemetry.progress import track
from components.training.distributed.checkpoint_writer import CheckpointWriter
from components.training.distributed.checkpoints import CheckpointStore
from components.training.distributed.ranks import Ranks, initialize_engine
from components.training.dit.adapters import add_adapter, save_adapted
from components.training.dit.assembly import training_ids
from components.training.dit.batch_plan import BatchPlan, GlobalBatch, PlanState
from components.training.dit.block_compilation import (
    check_compilation,
    compile_blocks,
    compile_for_buckets,
    uncompiled,
)
from components.training.dit.curriculum import draw_noise
from components.training.dit.export import Card, save_transformer
from components.training.dit.job import WEIGHTS_NAMES, DitJob, TrainingDiverged, build_transformer
from components.training.dit.model_card import facts_of_run, model_card
from components.training.dit.sample_grids import grids_of_run
from components.training.dit.throughput import Throughput
from components.training.dit.validation import LEVELS, ValidationSet
from components.training.dit.velocity import NoisedBatch, band_errors, predict_velocity
from components.training.sharded.activation_checkpointing import enable_activation_checkpointing
from components.training.sharded.context_parallel import (
    check_context_parallel,
    enable_context_parallel,
)
from components.training.sharded.ema import WeightAverage
from components.training.sharded.host_copies import HostCopies
from components.training.sharded.weight_shards import WeightShard, assemble, master_shards
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

STATE_FILE = "trainer.json"
ENGINE_FOLDER = "engine"


def learning_rate(step: int, settings: DitStageSettings) -> float:
    """Learning rate of optimizer step `step` (0 first): linear warm-up, then the schedule.

    `cosine` falls to zero at the last step.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    remaining = max(1, settings.steps - settings.warmup_steps)
    progress = (step - settings.warmup_steps) / remaining
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def band_losses(t: Tensor, losses: Tensor) -> dict[str, float]:
    """Mean training loss in each of eight equal noise bands that occur in the batch."""
    bands = (t * LEVELS).long().clamp(0, LEVELS - 1)
    return {
        f"loss_band_{band}": float(losses[bands == band].double().mean())
        for band in sorted(set(bands.tolist()))
    }


def train(job: DitJob, ranks: Ranks) -> None:
    """Train, validate and export one stage; continues from the newest checkpoint.

    Writes `export_dir/raw` and `export_dir/ema` (diffusers folders, float32 safetensors) and the
    metric log (rank 0). Call in every rank, inside `open_ranks` and `deterministic_torch`.

    Raises:
        TrainingDiverged: a loss or gradient is not finite.
        CheckpointFailed: a checkpoint could not be written; training goes on from the one before.
        PlanMismatch: the checkpoint was trained on other data.
        ValueError: settings that do not fit together, or nothing to train on.
    """
    trainer = DitTrainer(job, ranks)
    try:
        trainer.run()
    finally:
        trainer.writer.close()


class DitTrainer:
    """State of one run."""

    def __init__(self, job: DitJob, ranks: Ranks) -> None:
        """Open the stores, build model and engine, and load the newest checkpoint if any."""
        self.job, self.ranks, self.settings = job, ranks, job.settings
        check_compilation(job.settings, job.runtime)
        verify = job.runtime.verify_reads
        self.latents = LatentStore(job.latents, verify=verify)
        self.texts = TextStore(job.texts, verify=verify)
        index = self.latents.index
        buckets = training_ids(index, job.train_slice, self.latents.rejected)
        self.plan = BatchPlan(buckets, self.settings.global_batch_size, job.seed)
        self.validation = ValidationSet(
            self.latents,
            self.texts,
            list(index.loc[index["split"] == "eval", "image_id"]),
            repeats=self.settings.validation_repeats,
            batch_size=self.settings.micro_batch_size,
            seed=job.seed,
        )
        channels = int(index["latent_channels"].iloc[0])
        model = build_transformer(job, self.texts.widths, channels)
        sizes = zip(index["latent_h"], index["latent_w"], strict=True)
        check_stores(model, self.texts.widths, channels, ((int(h), int(w)) for h, w in sizes))
        if ranks.context_degree > 1:
            check_context_parallel(model, ranks.context_degree, self.texts.tokens, index)
            enable_context_parallel(model, ranks)
        if self.settings.adapter is not None:
            add_adapter(model, self.settings.adapter, job.seed)
        enable_activation_checkpointing(model, self.settings.gradient_checkpointing)
        model.train()
        is_compiled = job.runtime.compile == "blocks"
        if is_compiled:
            compile_blocks(model)
        self.engine = initialize_engine(model, self.settings, ranks)
        self.dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        self.uncompiled = uncompiled if is_compiled else nullcontext
        if is_compiled:
            compile_for_buckets(
                self.engine, self._empty_batches(), self.settings.guidance_scale, self.dtype
            )
        self.average = WeightAverage(
            self._masters(),
            self.settings.ema_decay,
            ranks,
            torch.device("cpu") if self.settings.ema_device == "cpu" else None,
        )
        self.metrics = MetricLog(job.metrics) if ranks.is_first else None
        self.checkpoints = CheckpointStore(
            job.state_dir / "checkpoints",
            self.settings.keep_checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=ranks.barrier,
        )
        self.copies = HostCopies()
        self.writer = CheckpointWriter(
            self.checkpoints, in_background=self.settings.async_checkpoints
        )
        # Imports DeepSpeed, for which `open_ranks` has made the environment.
        from components.training.sharded import engine_snapshot

        engine_snapshot.install(self.engine, ranks, self.copies)
        self.throughput = Throughput(
            job.name,
            self.engine.module,
            images_per_step=self.settings.global_batch_size,
            world_size=ranks.world_size,
            peak_tflops=job.runtime.peak_tflops,
            memory_every=self.settings.watch_every,
        )
        self.samples = grids_of_run(job, self.latents, self.texts, self.validation.image_ids, ranks)
        self.progress = ""
        self.step = self._resume()

    def run(self) -> None:
        """All remaining steps, then the export."""
        if self.step == 0:
            self._validate("")
        with ThreadPoolExecutor(1, "batches") as loader:
            batches = self._prefetch(loader)
            remaining = range(self.step, self.settings.steps)
            shown = (
                track(
                    remaining,
                    self.job.name,
                    total=self.settings.steps,
                    initial=self.step,
                    note=lambda: self.progress,
                )
                if self.ranks.is_first
                else remaining
            )
            for step in shown:
                begin = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begin
                values = self._optimize(step, batch)
                took = time.perf_counter() - begin
                self.step = step + 1
                if self.ranks.is_first:
                    values |= self.throughput.measure(self.step, took, waited, batch[0])
                    self.progress = (
                        f"loss {values['loss']:.4f}, {values['images_per_s']:.3g} images/s"
                    )
                self._log(values)
                self._validate_and_save()
        self._export()

    def _validate_and_save(self) -> None:
        """What is due after the step just done."""
        self.writer.check()
        last = self.step == self.settings.steps
        if last or self.step % self.settings.validate_every == 0:
            self._validate("")
        grids = self.samples if self.samples and self.samples.is_due(self.step) else None
        if last or grids:
            with self.average.swapped_into(self.engine.module):
                if last:
                    self._validate("_ema")
                if grids:
                    with self.uncompiled():
                        grids.draw(self.engine.module, self.step)
        if last or self.step % self.settings.checkpoint_every == 0:
            self._write_checkpoint()
        if last:
            self.writer.wait()

    def _empty_batches(self) -> Iterator[NoisedBatch]:
        """A micro batch of zeros of every size in the store, on the device, in a fixed order."""
        index, count = self.latents.index, self.settings.micro_batch_size
        length, (width, pooled) = self.texts.tokens, self.texts.widths
        columns = ["latent_channels", "latent_h", "latent_w"]
        for shape in sorted(set(index[columns].itertuples(index=False, name=None))):
            latents = torch.zeros(count, *map(int, shape))
            texts = torch.zeros(count, length, width), torch.zeros(count, pooled)
            t = torch.full((count,), 0.5)
            ids = ("",) * count
            yield NoisedBatch(ids, latents, latents, t, *texts).to(self.ranks.device)

    def _prefetch(self, loader: ThreadPoolExecutor) -> Iterator[list[NoisedBatch]]:
        """Micro batches of the coming steps, one step ahead of the optimizer."""
        if self.step >= self.settings.steps:
            return
        coming = loader.submit(self._load, self.step)
        for step in range(self.step, self.settings.steps):
            ready = coming.result()
            if step + 1 < self.settings.steps:
                coming = loader.submit(self._load, step + 1)
            yield ready

    def _load(self, step: int) -> list[NoisedBatch]:
        """This rank's micro batches of one step."""
        share = self.plan.batch(step).rank_slice(self.ranks.data_rank, self.ranks.data_world_size)
        parts = share.micro_batches(self.settings.micro_batch_size)
        return [self._noised(part) for part in parts]

    def _noised(self, part: GlobalBatch) -> NoisedBatch:
        # In the stored precision: half the bytes on the way to the device, which widens exactly.
        pins = self.ranks.device.type == "cuda"
        latents = self.latents.read_stored(part.sample_ids, pin_memory=pins)
        channels, height, width = latents.shape[1:]
        noise, t = draw_noise(
            self.job.seed,
            part.step,
            part.sample_ids,
            part.occurrences,
            (channels, height, width),
            self.settings.timestep_density,
            self.settings.sigma_range,
        )
        rest: tuple[Tensor, ...] = (noise, t, *self.texts.read_stored(part.sample_ids))
        if pins:
            # Text states of several records are no contiguous tensor, which would not be pinned.
            rest = tuple(tensor.contiguous().pin_memory() for tensor in rest)
        return NoisedBatch(part.sample_ids, latents, *rest)

    def _optimize(self, step: int, batches: list[NoisedBatch]) -> dict[str, float]:
        """One optimizer step on this rank's micro batches; metrics of the global batch."""
        rate = learning_rate(step, self.settings)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        watched = (step + 1) % self.settings.watch_every == 0
        rows = []
        for number, host_batch in enumerate(batches):
            batch = host_batch.to(self.ranks.device)
            velocity = predict_velocity(
                self.engine, batch, self.settings.guidance_scale, self.dtype
            )
            per_sample = objective_loss(
                self.job.objective, velocity, batch.latents, batch.noise, batch.t
            )
            # Ranks that share a sample hold parts of its gradient, and ZeRO averages over them.
            self.engine.backward(self.ranks.context_degree * per_sample.mean())
            columns = [batch.t, per_sample.detach().float()]
            if watched:
                columns += band_errors(velocity.detach(), batch)
            rows.append(torch.stack(columns))
            if number == len(batches) - 1:
                # Checked before the update, so that the weights stay as they were.
                gathered = self.ranks.gather_samples(torch.cat(rows, 1))
                t, loss = gathered[:2]
                if not bool(torch.isfinite(loss).all()):
                    self._diverged(step, batches, "loss")
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            self._diverged(step, batches, "gradient norm")
        self.average.update(self._masters())
        return {
            "loss": float(loss.double().mean()),
            "grad_norm": norm,
            "lr": rate,
            **band_losses(t, loss),
            **{
                f"error_{name}": float(values.double().mean())
                for name, values in zip(BAND_NAMES, gathered[2:], strict=False)
            },
        }

    def _diverged(self, step: int, batches: list[NoisedBatch], what: str) -> None:
        """Save this rank's batch and stop, with the checkpoint in flight committed."""
        folder = self.job.state_dir / "diverged" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(batches):
            name = f"rank{self.ranks.rank}-micro{number}.safetensors"
            ids = json.dumps(batch.sample_ids)
            save_file(batch.tensors(), folder / name, metadata={"sample_ids": ids})
        self.writer.wait()
        # The first rank to leave ends the others.
        self.ranks.barrier()
        raise TrainingDiverged(
            f"{self.job.name}: {what} is not finite at step {step}; the batch is in {folder}; "
            "lower the learning rate or check these latents, the last checkpoint is untouched"
        )

    def _validate(self, suffix: str) -> None:
        module = self.engine.module
        module.eval()
        with self.uncompiled():
            result = self.validation.evaluate(
                module, self.job.objective, self.settings.guidance_scale, self.dtype, self.ranks
            )
        module.train()
        self._log(result.metrics(suffix))

    def _log(self, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(values, self.step)

    def _write_checkpoint(self) -> None:
        """Copy the state after the step just done and hand it to the writer; collective."""
        from components.training.sharded import engine_snapshot

        self.writer.wait()
        opened = self.checkpoints.begin(self.step)
        folder = opened.aside
        writes = engine_snapshot.engine_writes(self.engine, folder, ENGINE_FOLDER)
        writes.append(self.average.take_write(folder, self.copies))
        if self.ranks.is_first:
            state = {
                "plan": self.plan.state(self.step).as_dict(),
                "ema_updates": self.average.updates,
                "processes": self.ranks.world_size,
            }
            text = json.dumps(state, indent=1)
            writes.append(lambda: write_text(folder / STATE_FILE, text, durable=True))
        self.writer.submit(opened, [self.copies.fence(), *writes])

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps done."""
        newest = self.checkpoints.latest()
        if newest is None:
            if self.metrics is not None:
                self.metrics.rewind(-1)
            return 0
        step, folder = newest
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.plan.check(PlanState(**state["plan"]))
        from components.training.sharded import engine_snapshot

        engine_snapshot.load_engine(self.engine, folder, ENGINE_FOLDER)
        self.average.load(folder, state["ema_updates"])
        if self.metrics is not None:
            self.metrics.rewind(step)
        return step

    def _masters(self) -> Iterator[WeightShard]:
        return master_shards(self.engine, self.ranks)

    def _export(self) -> None:
        """Diffusers folders of the trained weights and of their average, float32."""
        job = self.job
        masters = ((s.name, assemble(s, self.ranks)) for s in self._masters())
        facts = (
            facts_of_run(job, self.plan, self.latents, self.texts, self.metrics.rows())
            if self.metrics is not None
            else None
        )
        for name, tensors in zip(
            WEIGHTS_NAMES, (masters, self.average.whole_tensors()), strict=True
        ):
            # Every rank takes part in putting each tensor together; only the first keeps it.
            weights = {key: value.cpu() for key, value in tensors if self.ranks.is_first}
            if facts is not None:
                self._save_weights(
                    weights, job.export_dir / name, partial(model_card, job, facts, name)
                )
        self.ranks.barrier()

    def _save_weights(self, weights: dict[str, Tensor], folder: Path, card: Card) -> None:
        size = self.settings.max_shard_gb
        if self.settings.adapter is None:
            save_transformer(self.engine.module, weights, folder, max_shard_gb=size, card=card)
            return
        channels = int(self.latents.index["latent_channels"].iloc[0])
        base = build_transformer(self.job, self.texts.widths, channels)
        save_adapted(base, self.settings.adapter, weights, folder, max_shard_gb=size, card=card)
