"""Decoder-only post-training of the autoencoder (UltraFlux, supplement: F16 VAE).

The encoder stays as it is, so latents made before training remain valid. The decoder runs inside
DistributedDataParallel, which averages gradients over processes. (The released Diffusion-4K
trainer calls the wrapped module directly and so trains every process alone.)

Data are a pure function of the step and nothing else is random, so weights, optimizer and step are
the whole state: a resumed run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.images.arrays import ImageArray
from components.images.pixel_range import to_model, to_pixels
from components.metrics.native.fidelity import psnr_db
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.objectives.reconstruction import ReconstructionLoss
from components.settings.training import VaeSettings
from components.telemetry.metric_log import MetricLog
from components.telemetry.progress import track
from components.training.distributed.checkpoint_writer import CheckpointWriter
from components.training.distributed.checkpoints import CheckpointStore, load_state, save_state
from components.training.distributed.divergence import (
    DivergenceEvent,
    DivergenceGuard,
    TrainingDiverged,
    batch_folder,
    write_events,
)
from components.training.distributed.interruption import StopRequest, note_interruption
from components.training.distributed.ranks import Ranks
from components.training.vae.crops import Crop, TileCrops

MAX_GRAD_NORM = 1.0
"""Gradient clipping of the training engine; from random weights single batches spike without it."""
# The newest, and one more for the case that it proves unreadable.
KEEP_CHECKPOINTS = 2
_STATE_FILE = "state.pt"
# Held-out crops that are decoded together; bounds memory, without effect on the result.
_EVAL_BATCH = 4


class _Diverged(Exception):
    """An update was refused, and the run goes back; never leaves this module."""


class TrainableDecoder(nn.Module):
    """Latent to image: the part that post-training changes."""

    def __init__(self, autoencoder: AutoencoderKLF16) -> None:
        """Share the parameters of `autoencoder`."""
        super().__init__()
        # The same modules and no copies: what is trained here is what the autoencoder decodes with.
        self.post_quant_conv = autoencoder.post_quant_conv
        self.decoder = autoencoder.decoder

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        """(B, C, h, w) raw (not normalised) latents to (B, 3, H, W) about [-1, 1]."""
        if self.post_quant_conv is not None:
            latents_BCHW = self.post_quant_conv(latents_BCHW)
        image: Tensor = self.decoder(latents_BCHW)
        return image


@dataclass(frozen=True)
class VaeTraining:
    """What a finished run hands over."""

    history: list[dict[str, float]]
    """A row per step from 0: step, loss, its terms, grad_norm, psnr_db (NaN where not measured)."""
    held_out: list[ImageArray]
    """Held-out crops, (crop_px, crop_px, 3) uint8."""
    before: list[ImageArray]
    """Their reconstructions by the base autoencoder."""
    after: list[ImageArray]
    """Their reconstructions by the trained one."""
    divergences: tuple[DivergenceEvent, ...] = ()
    """Updates that the guard refused."""


def freeze_encoder(autoencoder: AutoencoderKLF16) -> None:
    """Only decoder parameters take gradients from here on."""
    # Switched off everywhere first: a part that nobody thought of stays frozen.
    autoencoder.requires_grad_(False)
    autoencoder.decoder.requires_grad_(True)
    if autoencoder.post_quant_conv is not None:
        autoencoder.post_quant_conv.requires_grad_(True)


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKLF16, images: Sequence[ImageArray]) -> list[ImageArray]:
    """Encode (posterior mode) and decode uint8 images of one size."""
    device = next(autoencoder.parameters()).device
    pixels: list[ImageArray] = []
    for start in range(0, len(images), _EVAL_BATCH):
        batch = to_model(images[start : start + _EVAL_BATCH]).to(device)
        # The mode, as in the latent store, and no normalisation: it is undone before decoding
        # anyway.
        latents = autoencoder.encode(batch).latent_dist.mode()
        pixels += to_pixels(autoencoder.decode(latents).sample)
    return pixels


def mean_psnr_db(references: Sequence[ImageArray], images: Sequence[ImageArray]) -> float:
    """Mean over images of the PSNR in dB of their 8-bit pixels."""
    return float(np.mean([psnr_db(x, y) for x, y in zip(references, images, strict=True)]))


def add_gradient(
    autoencoder: AutoencoderKLF16,
    decoder: nn.Module,
    loss: ReconstructionLoss,
    images: Tensor,
    weight: float,
    precision: Literal["bf16", "fp32"],
) -> dict[str, Tensor]:
    """Add the gradient of `weight` times the mean loss of a part of a batch.

    Args:
        autoencoder: frozen encoder.
        decoder: `TrainableDecoder`, or a wrapper around it.
        loss: of reconstructions.
        images: (B, 3, H, W) in [-1, 1].
        weight: of this part.
        precision: of the networks; weights and loss stay float32.

    Returns:
        The weighted terms, detached.
    """
    # No gradient scaler: bfloat16 has the exponents of float32.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        # The encoder is frozen: no activations of it are kept for a backward pass.
        with torch.no_grad():
            latents = autoencoder.encode(images).latent_dist.mode()
        decoded = decoder(latents)
    # In float32: squares of small differences vanish in bfloat16.
    terms = loss(decoded.float(), images)
    # Outside autocast: a backward pass uses the precision of its forward pass.
    (terms["total"] * weight).backward()
    return {name: term.detach() * weight for name, term in terms.items()}


class _Run:
    """Mutable state of one training run in one rank."""

    def __init__(
        self,
        autoencoder: AutoencoderKLF16,
        settings: VaeSettings,
        ranks: Ranks,
        state_dir: Path,
        begun_at: int,
    ) -> None:
        self.autoencoder = autoencoder
        self.settings = settings
        self.ranks = ranks
        self.state_dir = state_dir
        self.guard = DivergenceGuard(settings.divergence, begun_at)
        self.goes_back = settings.on_divergence == "rollback"
        self.store = CheckpointStore(
            state_dir / "checkpoints",
            KEEP_CHECKPOINTS,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=ranks.barrier,
            on_any_rank=lambda flag: ranks.any(flag)[0],
            is_needed=self.guard.is_anchor if self.goes_back else lambda *_: False,
        )
        # Not in the background: the states are small, and a full disk is said in the same words.
        self.writer = CheckpointWriter(self.store, in_background=False)
        self.step = 0
        self.history: list[dict[str, float]] = []
        if settings.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        self.decoder = TrainableDecoder(autoencoder)
        # Wraps the decoder alone: the wrapper expects a gradient for every parameter that it holds
        # and that is trained.
        self.wrapped = DistributedDataParallel(
            self.decoder, device_ids=[ranks.device] if ranks.device.type == "cuda" else None
        )
        self.optimizer = torch.optim.AdamW(
            self.decoder.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.loss = ReconstructionLoss(settings.loss).to(ranks.device)

    def save(self) -> None:
        # All that a step depends on: crops are a function of the step, and nothing else is random.
        state = {
            "step": self.step,
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "guard": self.guard.state(),
        }
        opened = self.store.begin(self.step, healthy=self.guard.is_healthy(self.step))
        # The replicas are equal, so one copy is enough.
        writes = [partial(save_state, opened.aside / _STATE_FILE, state)]
        self.writer.submit(opened, writes if self.ranks.is_first else [])
        # Whole on every rank, or this rank's error is out by now.
        self.ranks.barrier()

    def resume(self) -> bool:
        found = self.store.latest_intact()
        if found is None:
            return False
        self._load(found[1])
        return True

    def _load(self, checkpoint: Path, *, keep_events: bool = False) -> None:
        # On the CPU: `load_state_dict` puts each value where its parameter is.
        state = load_state(checkpoint / _STATE_FILE)
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        # torch saves both with the moments; those of the settings count, which a segment may have
        # changed.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
        # The tables are made from it, so a resumed run has to remember all of its past.
        self.history = state["history"]
        self.step = state["step"]
        # One of a state from before there was a guard has none.
        if "guard" in state:
            self.guard.restore(state["guard"], keep_events=keep_events)

    def train_step(self, images: Tensor) -> tuple[dict[str, float], str | None]:
        """One optimizer step on this rank's crops.

        Returns:
            Loss terms averaged over ranks, and why there was no update; None: there was.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.guard.rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = images.split(self.settings.micro_batch_size)
        terms: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            # Gradients travel once a step, with the last part.
            alone = number < len(parts) - 1
            with self.wrapped.no_sync() if alone else nullcontext():
                # Weighted by crops: the last part may be smaller than the others.
                for name, term in self._backward(part, len(part) / len(images)).items():
                    terms[name] = terms[name] + term if name in terms else term
        # After the last part, when the gradients are those of the whole batch and equal on all
        # ranks.
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), MAX_GRAD_NORM)
        names = ["loss" if name == "total" else f"loss_{name}" for name in terms]
        values = torch.stack(list(terms.values()))
        # Once a step for all terms together, on every rank alike.
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        self.ranks.beat()
        values /= self.ranks.world_size
        # The norm is not averaged: gradients are equal on every rank already.
        measured = dict(zip(names, values.tolist(), strict=True)) | {"grad_norm": float(norm)}
        # Every rank sees the same averages, so all of them judge alike, before the weights change.
        reason = self.guard.judge(measured["loss"], measured["grad_norm"])
        if reason is None:
            self.optimizer.step()
            self.guard.accept(self.step, measured["loss"], measured["grad_norm"])
        return measured, reason

    def _backward(self, images: Tensor, weight: float) -> dict[str, Tensor]:
        """`add_gradient` through the wrapper that averages over ranks."""
        return add_gradient(
            self.autoencoder, self.wrapped, self.loss, images, weight, self.settings.precision
        )

    @property
    def _batch_folder(self) -> Path:
        return batch_folder(self.state_dir, self.step)

    def refused(
        self, images: Tensor, crops: Sequence[Crop], measured: dict[str, float], reason: str
    ) -> None:
        """Keep what is needed to repeat a step whose update was refused, and do as settings say.

        Raises:
            TrainingDiverged: the run ends.
            _Diverged: it goes back.
        """
        self._batch_folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "step": self.step + 1,
            "images": images,
            "crops": [[one.photograph, one.tile, one.top, one.left, one.flip] for one in crops],
            "measured": measured,
            "decoder": self.decoder.state_dict(),
        }
        # A file for each rank: any of them may hold the crop that is at fault.
        save_state(self._batch_folder / f"rank{self.ranks.rank}.pt", state)
        if self.settings.on_divergence == "stop" or self.guard.is_exhausted:
            self.give_up(reason)
        if self.goes_back:
            raise _Diverged(reason)
        self._tell(self.guard.skipped(self.step, reason))

    def give_up(self, reason: str) -> NoReturn:
        """End the run; a checkpoint that is not healthy is none to go on from."""
        if self.ranks.is_first:
            self.store.reject(lambda _, healthy: not healthy)
        # The first rank to leave ends the others, which may still be writing their batches.
        self.ranks.barrier()
        newest = self.store.latest()
        kept = f"the checkpoint of step {newest[0]} is whole" if newest else "no checkpoint is left"
        after = f" after {len(self.guard.events)} events" if self.guard.events else ""
        raise TrainingDiverged(
            f"vae: {reason} at step {self.step + 1}{after}; the batch and the weights before it "
            f"are in {self._batch_folder}; {kept}: lower vae.learning_rate (now "
            f"{self.settings.learning_rate:g}), look at the batch, or set vae.on_divergence (skip, "
            "rollback) and --continue-from this run"
        )

    def go_back(self, reason: str, metrics: MetricLog) -> None:
        """Return to a healthy checkpoint before a divergence; collective."""
        target = self.guard.anchor(self.step)
        # Written by all of them, and none is rejected before all have looked.
        self.ranks.barrier()
        saved = self.store.healthy_at(target)
        if saved is None:
            self.give_up(f"{reason} (no healthy checkpoint of step {target})")
        self.ranks.barrier()
        if self.ranks.is_first:
            self.store.reject(lambda at, _: at > target)
        self._tell(self.guard.rolled_back(self.step, reason, target))
        self._load(saved, keep_events=True)
        if self.ranks.is_first:
            metrics.rewind(target)
        self.ranks.barrier()

    def _tell(self, event: DivergenceEvent) -> None:
        """Leave the events for the record, and one line for people."""
        if self.ranks.is_first:
            write_events(self.state_dir, self.guard)
            print(f"vae: {event}", file=sys.stderr, flush=True)

    def is_due(self) -> bool:
        """Whether the number of steps asks for a checkpoint."""
        if self.step == self.settings.steps:
            return True
        anchors = self.goes_back and self.guard.is_anchor(self.step, self.step)
        return anchors or self.step % self.settings.checkpoint_every == 0


def check_batch(settings: VaeSettings, processes: int) -> None:
    """Refuse a batch that does not divide over the processes.

    Raises:
        ValueError: it does not.
    """
    # Gradients are averaged over ranks, so unequal shares would weigh crops unequally.
    if settings.batch_size % processes:
        raise ValueError(
            f"vae.batch_size = {settings.batch_size} must be a multiple of the {processes} "
            "training processes (runtime.processes, nodes)"
        )


def train_vae(
    autoencoder: AutoencoderKLF16,
    photographs: TileCrops,
    held_out_photographs: TileCrops,
    settings: VaeSettings,
    ranks: Ranks,
    *,
    seed: int,
    state_dir: Path,
    metrics: MetricLog,
    stop: StopRequest | None = None,
    begun_at: int = 0,
) -> VaeTraining:
    """Train the decoder of `autoencoder` in place; continues from the newest checkpoint.

    Call in every rank, inside `open_ranks` and `deterministic_torch`.

    Args:
        autoencoder: base autoencoder; its encoder does not change by a bit.
        photographs: training photographs.
        held_out_photographs: other photographs, on which PSNR is measured.
        settings: steps, batch, learning rate, loss, intervals.
        ranks: this process among all.
        seed: of crops.
        state_dir: checkpoints, and the batch of a failed step.
        metrics: loss terms, grad_norm and images_per_s every step, psnr_db when measured.
        stop: asked after every step.
        begun_at: steps done when the newest segment began, whose checkpoint is there.

    Raises:
        TrainingInterrupted: some rank was asked to stop; the state is saved.
        TrainingDiverged: a loss or gradient norm is not finite or far above its running mean, and
            `on_divergence` is `stop` or exhausted; weights are those before the offending step.
        DiskFull: no room for a checkpoint; the one before it is whole.
        ValueError: the global batch does not divide by the number of processes.
    """
    check_batch(settings, ranks.world_size)
    # Evaluation mode throughout: nothing in a step may be random but the choice of crops.
    autoencoder.to(ranks.device).eval()
    freeze_encoder(autoencoder)
    # Every rank measures, and none sends: PSNR needs no agreement, and the crops are few.
    held_out = held_out_photographs.held_out(seed, settings.eval_crops)
    # Before a checkpoint is loaded into the decoder: this is the base autoencoder's work.
    before = reconstruct(autoencoder, held_out)
    run = _Run(autoencoder, settings, ranks, state_dir, begun_at)
    if not run.resume():
        run.history.append({"step": 0, "psnr_db": mean_psnr_db(held_out, before)})
    if ranks.is_first:
        # Steps after the checkpoint happen again; without one, so does step 0.
        metrics.rewind(run.step or -1)
        if run.step == 0:
            metrics.log({"psnr_db": run.history[0]["psnr_db"]}, 0)
    if run.goes_back and run.step == run.guard.anchor(run.step):
        # There may be none yet to go back to.
        run.save()
    while run.step < settings.steps:
        try:
            _run_on(run, photographs, held_out, seed, metrics, stop)
        except _Diverged as event:
            run.go_back(str(event), metrics)
    if ranks.is_first:
        write_events(state_dir, run.guard)
    after = reconstruct(autoencoder, held_out)
    if "psnr_db" not in run.history[-1]:
        # No step was left, and the last one was a step like others when it was taken.
        run.history[-1]["psnr_db"] = mean_psnr_db(held_out, after)
        if ranks.is_first:
            metrics.log({"psnr_db": run.history[-1]["psnr_db"]}, run.step)
    # It is handed over for use, and an export or a metric needs no gradients.
    autoencoder.requires_grad_(False)
    return VaeTraining(run.history, held_out, before, after, tuple(run.guard.events))


def _run_on(
    run: _Run,
    photographs: TileCrops,
    held_out: Sequence[ImageArray],
    seed: int,
    metrics: MetricLog,
    stop: StopRequest | None,
) -> None:
    """Steps to the end, or to a divergence that is gone back from; with what is due after each."""
    settings, ranks = run.settings, run.ranks
    share = settings.batch_size // ranks.world_size
    # Numbers of the global batch: with other ranks the same crops make up a step.
    mine = range(ranks.rank * share, (ranks.rank + 1) * share)
    todo = range(run.step, settings.steps)
    saved_at = time.monotonic()
    for step in track(todo, "vae", total=settings.steps, initial=run.step):
        started = time.perf_counter()
        measured: dict[str, float] = {"left_out": 1.0}
        # Not even computed: the event has settled what becomes of it.
        if not run.guard.leaves_out(step):
            images = photographs.batch(seed, step, mine)
            found, reason = run.train_step(images.to(ranks.device))
            if reason is None:
                measured = found
            else:
                crops = [photographs.crop_at(seed, step, index) for index in mine]
                run.refused(images, crops, found, reason)
        run.step = step + 1
        step_s = time.perf_counter() - started
        last = run.step == settings.steps
        if last or run.step % settings.eval_every == 0:
            measured["psnr_db"] = mean_psnr_db(held_out, reconstruct(run.autoencoder, held_out))
        run.history.append({"step": run.step, **measured})
        if ranks.is_first:
            # Throughput depends on the machine, so it is not part of the history.
            pace = {"images_per_s": settings.batch_size / step_s, "step_s": step_s}
            metrics.log(measured | pace, run.step)
        minutes = settings.checkpoint_every_minutes
        is_late = minutes is not None and time.monotonic() - saved_at >= 60.0 * minutes
        # One answer for all ranks: a signal and a clock reach each of them at another step.
        stops, is_late = ranks.any(bool(stop), is_late)
        if stops or is_late or run.is_due():
            run.save()
            saved_at = time.monotonic()
        if stops and not last:
            raise note_interruption(run.state_dir, "vae", run.step, settings.steps)
