"""Training of the DiT with DeepSpeed: one stage of SACL from its settings to exported weights.

`train` runs in every rank. A step is a pure function of (weights, optimizer state, step number):
the batch plan gives the samples, keyed generators give noise and levels. So a run that was killed
and resumed from a checkpoint ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.engine.read_ahead import read_ahead
from components.objectives.haar import BAND_NAMES
from components.objectives.objective import objective_loss
from components.telemetry.progress import track
from components.training.adapters.adapter_files import BASE_SHA256
from components.training.distributed.divergence import (
    TrainingDiverged,
    batch_folder,
    write_events,
)
from components.training.distributed.interruption import StopRequest, note_interruption
from components.training.distributed.optimizers import learning_rate
from components.training.distributed.ranks import Ranks
from components.training.dit.adapters import (
    adapter_about,
    adapter_base,
    merged_weights,
    save_adapted,
)
from components.training.dit.assembly import (
    AssembledRun,
    apply_settings_after_load,
    assemble_run,
)
from components.training.dit.export import Card, save_transformer
from components.training.dit.job import (
    WEIGHTS_NAMES,
    DitJob,
    build_transformer,
    refuse_other_start,
)
from components.training.dit.model_card import facts_of_run, file_metadata, model_card
from components.training.dit.throughput import CHECKPOINT_STALL
from components.training.dit.validation import ValidationLoss, ValidationSet, band_losses
from components.training.dit.velocity import NoisedBatch, band_errors, predict_velocity
from components.training.sharded.hand_over import (
    StoredWeights,
    Where,
    compared,
    movement,
    note_hand_over,
    write_movement,
)
from components.training.sharded.weight_shards import assemble, master_shards


def train(job: DitJob, ranks: Ranks, stop: StopRequest | None = None) -> None:
    """Train, validate and export one stage; continues from the newest checkpoint.

    Writes `export_dir/raw` and `export_dir/ema` (diffusers folders, float32 safetensors) and the
    metric log (rank 0). Call in every rank, inside `open_ranks` and `deterministic_torch`.

    Args:
        job: what to do.
        ranks: this process among all.
        stop: asked after every step.

    Raises:
        TrainingInterrupted: some rank was asked to stop; the state is saved.
        TrainingDiverged: a loss or gradient norm is not finite or far above its running mean, and
            the settings do not say how to go on, or not so often.
        CheckpointFailed: a checkpoint could not be written; training goes on from the one before.
        PlanMismatch: the checkpoint was trained on other data.
        ValueError: settings that do not fit together, or nothing to train on.
    """
    parts = assemble_run(job, ranks)
    try:
        DitTrainer(parts, stop).run()
        export_weights(parts)
    finally:
        # Also after an error: the checkpoint in flight is finished or given up, never left.
        parts.checkpoints.writer.close()


class _Diverged(Exception):
    """An update was refused, and the run goes back; never leaves this module."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class DitTrainer:
    """Takes the steps of one assembled run."""

    def __init__(self, parts: AssembledRun, stop: StopRequest | None = None) -> None:
        """Go on after `parts.steps_done` steps, until `stop` is set or all are done."""
        self.parts = parts
        self._stop = stop
        self._saved_at = time.monotonic()
        self._stalled: dict[str, float] = {}
        self.job, self.ranks, self.settings = parts.job, parts.ranks, parts.job.settings
        self.engine, self.average, self.metrics = parts.engine, parts.average, parts.metrics
        self.guard, self.gate = parts.guard, parts.gate
        self.step = parts.steps_done
        self._progress = ""

    def run(self) -> None:
        """All remaining steps, with what is due after each."""
        # Only a fresh start: a resumed run has this row in its log, and the headline's "first"
        # reads it.
        if self.step == 0:
            self._validate("")
        if self.settings.on_divergence == "rollback" and self.step == self.guard.anchor(self.step):
            # There may be none yet to go back to.
            self._write_checkpoint()
        if self.step == self.settings.steps:
            self._validate_as_last()
        # Resumed after the last step: only the export is left to do.
        while self.step < self.settings.steps:
            try:
                self._run_on()
            except _Diverged as event:
                self._go_back(event)

    def _validate_as_last(self) -> None:
        """What the last step would have measured: it was a step like others when it was taken."""
        rows = [] if self.metrics is None else self.metrics.rows()
        here = {name for row in rows if row["step"] == self.step for name in row}
        log = self.metrics is not None
        lacks_raw, lacks_average = self.ranks.any(
            *(log and f"validation_loss{suffix}" not in here for suffix in ("", "_ema"))
        )
        if lacks_raw:
            self._validate("")
        if lacks_average:
            with self.average.swapped_into(self.engine.module):
                self._validate("_ema")

    def _run_on(self) -> None:
        """Steps to the end, or to a divergence that is gone back from."""
        # One thread and one step ahead hide the reading; more would only hold more memory, since
        # `record_reader` keeps the disk's queue full by itself.
        steps = range(self.step, self.settings.steps)
        with closing(read_ahead(self._load, steps, threads=1, ahead=2)) as batches:
            for step in self._shown(steps):
                # The clock runs over the wait as well: a step is what passes between two updates.
                begin = time.perf_counter()
                _, batch = next(batches)
                waited = time.perf_counter() - begin
                # Not even computed: the event has settled what becomes of it.
                leaves_out = self.guard.leaves_out(step)
                values = {"left_out": 1.0} if leaves_out else self._optimize(step, batch)
                took = time.perf_counter() - begin
                self.step = step + 1
                if self.ranks.is_first:
                    values |= self.parts.throughput.measure(self.step, took, waited, batch[0])
                    values |= self._stalled
                    self._stalled = {}
                    if "loss" in values:
                        self._progress = (
                            f"loss {values['loss']:.4f}, {values['images_per_s']:.3g} images/s"
                        )
                # Before validation and checkpoint: a step must be in the log when a checkpoint
                # includes it.
                self._log(values)
                self._validate_and_save()

    def _shown(self, steps: range) -> Iterable[int]:
        """The steps, with a progress line where this is the first rank."""
        if not self.ranks.is_first:
            return steps
        return track(
            steps,
            self.job.name,
            total=self.settings.steps,
            initial=self.step,
            note=lambda: self._progress,
        )

    def _validate_and_save(self) -> None:
        """What is due after the step just done."""
        # A failure of the writing thread ends the run here, at most one step late.
        self.parts.checkpoints.writer.check()
        # The last step is always validated, averaged and saved, whatever the intervals are.
        last = self.step == self.settings.steps
        if last or self.step % self.settings.validate_every == 0:
            self._validate("")
        grids = self.parts.grids
        if grids is not None and not grids.is_due(self.step):
            grids = None
        if last or grids is not None:
            # One swap for both: with ZeRO 3 each one communicates all weights.
            with self.average.swapped_into(self.engine.module):
                if last:
                    self._validate("_ema")
                if grids is not None:
                    # Its batches have other sizes, for which compiled blocks would get further
                    # graphs.
                    with self.parts.uncompiled():
                        grids.draw(self.engine.module, self.step)
        # One answer for all ranks: a signal and a clock reach each of them at another step.
        stops, is_late = self.ranks.any(bool(self._stop), self._is_late())
        # After validation: a run that goes on from this checkpoint does not validate again.
        if last or stops or is_late or self._is_due():
            self._write_checkpoint()
        if last or stops:
            # The export follows, and a kill during it must find the last checkpoint whole.
            self.parts.checkpoints.writer.wait()
        if stops and not last:
            self.ranks.barrier()
            raise note_interruption(
                self.job.state_dir, self.job.name, self.step, self.settings.steps
            )

    def _is_due(self) -> bool:
        """Whether the number of steps asks for a checkpoint."""
        if self.step % self.settings.checkpoint_every == 0:
            return True
        goes_back = self.settings.on_divergence == "rollback"
        return goes_back and self.guard.is_anchor(self.step, self.step)

    def _is_late(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        minutes = self.settings.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes

    def _load(self, step: int) -> list[NoisedBatch]:
        """This rank's micro batches of one step."""
        return self.parts.data.micro_batches(step, self.ranks)

    def _optimize(self, step: int, batches: list[NoisedBatch]) -> dict[str, float]:
        """One optimizer step on this rank's micro batches; metrics of the global batch."""
        # Set at every step, so that DeepSpeed's own scheduler has no state to resume.
        rate = learning_rate(step, self.settings) * self.guard.rate
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        watched = (step + 1) % self.settings.watch_every == 0
        rows = []
        for number, host_batch in enumerate(batches):
            batch = host_batch.to(self.ranks.device)
            # Through the engine and not the bare module: DeepSpeed hooks into this forward pass.
            velocity = predict_velocity(
                self.engine, batch, self.settings.guidance_scale, self.parts.dtype
            )
            per_sample = objective_loss(
                self.job.objective,
                velocity,
                batch.latents,
                batch.noise,
                batch.t,
                compiled=self.parts.compiles_objective,
            )
            # Ranks that share a sample hold parts of its gradient, and ZeRO averages over them.
            self.engine.backward(self.ranks.context_degree * per_sample.mean())
            # Kept on the device until the end of the step: reading a number would wait for the GPU.
            columns = [batch.t, per_sample.detach().float()]
            if watched:
                # Only at watched steps, since it transforms a whole latent once more.
                columns += band_errors(velocity.detach(), batch)
            rows.append(torch.stack(columns))
            if number == len(batches) - 1:
                # Every rank sees the losses of all, so all of them judge alike.
                gathered = self.ranks.gather_samples(torch.cat(rows, 1))
                t, loss = gathered[:2]
                # In float64 over all samples: how they were divided leaves no trace in the mean.
                mean = float(loss.double().mean())
                # Judged before the update, so that the weights stay as they were.
                norm, reason = self.gate.take_step(partial(self.guard.judge, mean))
            else:
                # DeepSpeed counts micro batches and updates at the last one of the step.
                self.engine.step()
        if reason is not None:
            self._save_batches(step, batches)
            return self._diverged(step, reason)
        self.guard.accept(step, mean, norm)
        # Of the masters: the engine's own weights are rounded.
        self.average.update(master_shards(self.engine, self.ranks))
        return {
            "loss": mean,
            "grad_norm": norm,
            "lr": rate,
            **band_losses(t, loss),
            # Not strict: the errors by wavelet band are there at watched steps only.
            **{
                f"error_{name}": float(values.double().mean())
                for name, values in zip(BAND_NAMES, gathered[2:], strict=False)
            },
        }

    def _save_batches(self, step: int, batches: list[NoisedBatch]) -> None:
        """Keep this rank's batches of a step whose update was refused."""
        folder = batch_folder(self.job.state_dir, step)
        folder.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(batches):
            # A file for each rank: any of them may hold the sample that is at fault.
            name = f"rank{self.ranks.rank}-micro{number}.safetensors"
            ids = json.dumps(batch.sample_ids)
            save_file(batch.tensors(), folder / name, metadata={"sample_ids": ids})

    def _diverged(self, step: int, reason: str) -> dict[str, float]:
        """Do what the settings say about an update that was refused.

        Returns:
            What there is to log of a step that is left out.

        Raises:
            TrainingDiverged: the run ends.
            _Diverged: it goes back.
        """
        action = self.settings.on_divergence
        if action == "stop" or self.guard.is_exhausted:
            self._give_up(step, reason)
        if action == "rollback":
            raise _Diverged(step, reason)
        event = self.guard.skipped(step, reason)
        self._tell(str(event))
        return {"left_out": 1.0}

    def _give_up(self, step: int, reason: str) -> NoReturn:
        """End the run; a checkpoint that is not healthy is none to go on from."""
        checkpoints = self.parts.checkpoints
        checkpoints.writer.wait()
        if self.ranks.is_first:
            checkpoints.store.reject(lambda _, healthy: not healthy)
        # The first rank to leave ends the others, which may still be writing their batches.
        self.ranks.barrier()
        newest = checkpoints.store.latest()
        kept = (
            f"the checkpoint of step {newest[0]} is whole" if newest else "there is no checkpoint"
        )
        after = f" after {len(self.guard.events)} events" if self.guard.events else ""
        raise TrainingDiverged(
            f"{self.job.name}: {reason} at step {step + 1}{after}; the batch is in "
            f"{batch_folder(self.job.state_dir, step)}; {kept}: lower the learning rate, "
            f"check these latents, or set {self.job.name}.on_divergence (skip, rollback) and "
            "--continue-from this run"
        )

    def _go_back(self, diverged: _Diverged) -> None:
        """Return to a healthy checkpoint before a divergence; collective."""
        step, checkpoints = diverged.step, self.parts.checkpoints
        checkpoints.writer.wait()
        target = self.guard.anchor(step)
        # Written by all of them, and none is rejected before all have looked.
        self.ranks.barrier()
        saved = checkpoints.healthy_at(target)
        if saved is None or saved.guard is None:
            self._give_up(step, f"{diverged.reason} (no healthy checkpoint of step {target})")
        self.ranks.barrier()
        if self.ranks.is_first:
            checkpoints.store.reject(lambda at, _: at > target)
        event = self.guard.rolled_back(step, diverged.reason, target)
        self._tell(str(event))
        checkpoints.load(saved)
        apply_settings_after_load(self.engine, self.settings)
        self.guard.restore(saved.guard, keep_events=True)
        if self.metrics is not None:
            self.metrics.rewind(target)
        self.step = target
        self.ranks.barrier()

    def _tell(self, line: str) -> None:
        """Leave the events for the record, and one line for people."""
        if self.ranks.is_first:
            write_events(self.job.state_dir, self.guard)
            print(f"{self.job.name}: {line}", file=sys.stderr, flush=True)

    def _validate(self, suffix: str) -> None:
        module = self.engine.module
        module.eval()

        def measured(images: ValidationSet) -> ValidationLoss:
            return images.evaluate(
                module,
                self.job.objective,
                self.settings.guidance_scale,
                self.parts.dtype,
                self.ranks,
            )

        with self.parts.uncompiled():
            values = measured(self.parts.validation).metrics(suffix)
            if self.parts.training_images is not None:
                values[f"training_images_loss{suffix}"] = measured(self.parts.training_images).mean
        module.train()
        self._log(values)

    def _log(self, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(values, self.step)

    def _write_checkpoint(self) -> None:
        begin = time.perf_counter()
        self.parts.checkpoints.write(
            self.step,
            self.parts.data.plan.state(self.step).as_dict(),
            self.guard.state(),
            healthy=self.guard.is_healthy(self.step),
        )
        self._saved_at = time.monotonic()
        # What training stood still for; files may still be written beside the next steps. Logged
        # with the next step, since one step is one line.
        self._stalled = {CHECKPOINT_STALL: time.perf_counter() - begin}


def export_weights(parts: AssembledRun) -> None:
    """Diffusers folders of the trained weights and of their average, float32; collective.

    Raises:
        LearningLost: a folder does not hold what was learned.
        StartUnusable: the initial weights were replaced while training.
    """
    job, ranks, data = parts.job, parts.ranks, parts.data
    # From the float32 masters: the engine's own weights are rounded to bfloat16.
    masters = ((s.name, assemble(s, ranks)) for s in master_shards(parts.engine, ranks))
    # The first rank alone has a log, and alone writes folders.
    facts = None
    if parts.metrics is not None:
        rows, events = parts.metrics.rows(), parts.guard.events
        facts = facts_of_run(job, data.plan, data.latents, data.texts, rows, events)
        if facts.started_from:
            refuse_other_start(job, parts.checkpoints.started_from, facts.started_from)
    for name, tensors in zip(WEIGHTS_NAMES, (masters, parts.average.whole_tensors()), strict=True):
        # Every rank takes part in putting each tensor together; only the first keeps it.
        weights = {key: value.cpu() for key, value in tensors if ranks.is_first}
        if facts is not None:
            card, about = partial(model_card, job, facts, name), file_metadata(job, facts, name)
            _save_weights(parts, weights, job.export_dir / name, card, about)
            _check_export(parts, weights, job.export_dir / name)
    # Together: a rank that leaves takes its end of the process group with it.
    ranks.barrier()


def _save_weights(
    parts: AssembledRun, weights: dict[str, Tensor], folder: Path, card: Card, about: dict[str, str]
) -> None:
    settings, size = parts.job.settings, parts.job.settings.max_shard_gb
    if settings.adapter is None:
        module = parts.engine.module
        save_transformer(module, weights, folder, max_shard_gb=size, card=card, about=about)
        return
    # `weights` are the adapter's factors alone; they are merged into the base as it was loaded.
    base = adapter_base(parts.job, about.get(BASE_SHA256, ""))
    save_adapted(
        _start(parts),
        settings.adapter,
        weights,
        folder,
        max_shard_gb=size,
        card=card,
        before=base.before,
        about=adapter_about(parts.job, base, folder.name),
        about_whole=about,
    )


def _start(parts: AssembledRun) -> Any:
    """The transformer that training started from, once more."""
    return build_transformer(parts.job, parts.data.texts.widths, parts.data.latent_channels)


def _check_export(parts: AssembledRun, weights: dict[str, Tensor], folder: Path) -> None:
    """Compare what lies in an exported folder with what was learned, and leave the movement there.

    Raises:
        LearningLost: see `min_kept_movement`.
    """
    job = parts.job
    start = {name: tensor.detach() for name, tensor in _start(parts).named_parameters()}
    where: Where = "export"
    if job.settings.adapter is not None:
        # Merged here once more, by the definition and in float64.
        where = "merge"
        weights = merged_weights(start, job.settings.adapter, weights)
    squares = movement(weights, start)
    hand_over = compared(where, weights.items(), StoredWeights(folder).read, squares)
    write_movement(folder, squares)
    note_hand_over(job.state_dir, hand_over)
    hand_over.check(job.settings.min_kept_movement, job.name)
