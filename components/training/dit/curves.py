"""What a DiT training run leaves to look at: tables, headline numbers, digests and a figure.

Everything is derived from the metric log; durations in it are left out, so the files depend on
inputs and settings only.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from components.files.figures import new_figure, save_png
from components.files.weight_folders import folder_digest
from components.files.whole_files import write_text
from components.telemetry.metric_log import MetricLog
from components.telemetry.wording import few
from components.training.adapters.base_rounding import noted_rounding
from components.training.distributed.divergence import DivergenceEvent, read_events
from components.training.distributed.supervision import RankFailure, restarts
from components.training.dit.curriculum import trained_span
from components.training.dit.job import WEIGHTS_NAMES, DitJob
from components.training.dit.throughput import CHECKPOINT_STALL, WAIT_WARNING
from components.training.dit.validation import LEVELS, NOISE_LEVELS, ValidationLoss
from components.training.sharded.hand_over import HandOver, noted_hand_overs
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

# Named one by one, since the log also holds durations, which no output may depend on.
HISTORY_COLUMNS = ("loss", "grad_norm", "lr", *(f"loss_band_{band}" for band in range(LEVELS)))
Rows = Iterable[Mapping[str, float]]


def history_table(rows: Rows) -> pd.DataFrame:
    """One row per optimizer step: step and `HISTORY_COLUMNS` (NaN: no sample in that band)."""
    # The log also has rows of validation alone, such as that of step 0.
    steps = [row for row in rows if "loss" in row]
    table = pd.DataFrame(steps, columns=["step", *HISTORY_COLUMNS])
    return table.astype({"step": "int64"})


def validations(rows: Rows) -> list[tuple[int, str, ValidationLoss]]:
    """(step, "raw" or "ema", losses) in the order measured."""
    found = []
    for row in rows:
        for weights, suffix in (("raw", ""), ("ema", "_ema")):
            if f"validation_loss{suffix}" in row:
                losses = ValidationLoss.from_metrics(row, suffix)
                found.append((int(row["step"]), weights, losses))
    return found


def validation_table(rows: Rows) -> pd.DataFrame:
    """Columns step, weights, level (noise level t), loss (velocity error), objective."""
    return pd.DataFrame(
        [
            (step, weights, level, velocity, objective)
            for step, weights, losses in validations(rows)
            for level, velocity, objective in zip(
                NOISE_LEVELS, losses.velocity, losses.objective, strict=True
            )
        ],
        columns=["step", "weights", "level", "loss", "objective"],
    )


def missing_steps(rows: Rows, until: int) -> list[int]:
    """Steps up to `until`, all of which a run has logged, that are no longer there."""
    # The row of a step that was left out has no loss.
    taken = {int(row["step"]) for row in rows if "loss" in row or "left_out" in row}
    return sorted(set(range(1, until + 1)) - taken)


def missing_rows(rows: Sequence[Mapping[str, float]], until: int) -> str:
    """What a run that is at step `until` has logged and is no longer there; empty: nothing."""
    parts = []
    if not any(row["step"] == 0 and "validation_loss" in row for row in rows):
        parts.append("the validation before step 1")
    gone = missing_steps(rows, until)
    if gone:
        # Neighbours in one: a log that was cut short lacks thousands.
        breaks = [place for place in range(1, len(gone)) if gone[place] > gone[place - 1] + 1]
        spans = [gone[start:end] for start, end in pairwise([0, *breaks, len(gone)])]
        words = [f"{one[0]} to {one[-1]}" if len(one) > 1 else str(one[0]) for one in spans]
        parts.append(f"step{'s' if len(gone) > 1 else ''} {few(words, 4)}")
    return " and ".join(parts)


def say_missing_rows(job: DitJob, steps_done: int) -> None:
    """One line where a run goes on beside a metric log that has lost what was in it."""
    missing = missing_rows(list(MetricLog(job.metrics).rows()), steps_done)
    if missing:
        print(
            f"{job.name}: {job.metrics} lacks {missing}: numbers that need them will be left out "
            "of the result, and a gate that asks for one refuses; to keep them, end the run and "
            "bring the file back",
            file=sys.stderr,
            flush=True,
        )


def headline_metrics(
    rows: Sequence[Mapping[str, float]], sigma_range: tuple[float, float]
) -> dict[str, float]:
    """First and last validation losses; "last" is the averaged weights, which are sampled from.

    Args:
        rows: of the metric log.
        sigma_range: noise levels that were trained on.

    Returns:
        `validation_loss_first`, `_last`, `_last_raw`, `_drop` (relative, 1 - last / first), the
        same restricted to `sigma_range` (`validation_loss_in_range_*`), the objective's own
        values, `train_loss_first` / `_last` (means over a tenth of the steps), and where training
        images were measured like held-out ones, `training_images_loss_first`, `_last` and `_drop`.
        What needs a row that is not there is left out.
    """
    measured = validations(rows)
    raw = [losses for _, weights, losses in measured if weights == "raw"][-1]
    # Raw and average are compared with the same start: before training they are equal.
    last = [losses for _, weights, losses in measured if weights == "ema"][-1]
    numbers = {
        "validation_loss_last": last.mean,
        "validation_loss_last_raw": raw.mean,
        "validation_loss_in_range_last": last.mean_within(sigma_range),
        "validation_objective_last": float(np.mean(last.objective)),
    }
    # Row 0 is the validation before the first step; a later one is nobody's start.
    if measured[0][0] == 0:
        first = measured[0][2]
        numbers |= {
            "validation_loss_first": first.mean,
            "validation_loss_drop": 1.0 - last.mean / first.mean,
            "validation_loss_in_range_first": first.mean_within(sigma_range),
            "validation_objective_first": float(np.mean(first.objective)),
        }
    # One row may hold the losses of both weights: the last step's.
    name = "training_images_loss"
    seen = [(row["step"], row[name]) for row in rows if name in row]
    seen += [(row["step"], row[f"{name}_ema"]) for row in rows if f"{name}_ema" in row]
    if seen:
        numbers[f"{name}_last"] = seen[-1][1]
        if seen[0][0] == 0:
            numbers[f"{name}_first"] = seen[0][1]
            numbers[f"{name}_drop"] = 1.0 - seen[-1][1] / seen[0][1]
    losses = history_table(rows)["loss"].to_numpy()
    # Single steps scatter by their noise levels; a tenth of the run does not.
    tenth = max(1, len(losses) // 10)
    if len(losses) and not missing_steps(rows, measured[-1][0]):
        numbers["train_loss_first"] = float(np.mean(losses[:tenth]))
        numbers["train_loss_last"] = float(np.mean(losses[-tenth:]))
    return numbers


def draw_curves(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Training loss, validation loss, and first and last validation loss by noise level (PNG)."""
    history, measured = history_table(rows), validations(rows)
    figure = new_figure(13, 3.8)
    training, validation, levels = figure.subplots(1, 3)
    # Pale, because single steps scatter by their noise levels; the mean is what is read.
    training.plot(history["step"], history["loss"], linewidth=0.6, alpha=0.5, label="step")
    # A share of the run and no number of steps: runs differ by orders of magnitude.
    smooth = history["loss"].rolling(max(1, len(history) // 20), min_periods=1).mean()
    training.plot(history["step"], smooth, label="rolling mean")
    training.set(title="training objective", xlabel="step", yscale="log")
    training.legend()
    raw = [(step, losses.mean) for step, weights, losses in measured if weights == "raw"]
    ema = [(step, losses.mean) for step, weights, losses in measured if weights == "ema"]
    validation.plot(*zip(*raw, strict=True), marker="o", label="raw weights")
    validation.plot(*zip(*ema, strict=True), marker="*", markersize=12, linestyle="", label="EMA")
    validation.set(title="validation: velocity error, 8 noise levels", xlabel="step")
    validation.legend()
    began = "first" if measured[0][0] == 0 else f"step {measured[0][0]}"
    for label, losses in ((began, measured[0][2]), ("last (EMA)", measured[-1][2])):
        levels.plot(NOISE_LEVELS, losses.velocity, marker="o", label=label)
    levels.set(title="validation by noise level", xlabel="t (0 data, 1 noise)")
    levels.legend()
    figure.suptitle(title)
    # Signed as in every training so far: a stage that is run again has to give the same bytes.
    save_png(figure, path, signed=True)


@dataclass(frozen=True)
class DitOutcome:
    """What is worth saying about a finished run."""

    metrics: dict[str, float]
    """See `headline_metrics`."""
    digests: dict[str, str]
    """What the weights were trained on, and the weights themselves."""
    data_waits: int
    """How often waiting for data became too long."""
    restarts: tuple[RankFailure, ...]
    """Why the ranks had to start again, oldest first."""
    hand_overs: tuple[HandOver, ...]
    """How much of what was learned arrived, oldest first."""
    divergences: tuple[DivergenceEvent, ...]
    """Updates that were refused, oldest first."""
    checkpoint_stall_s: float | None
    """Median time that a step waited for the checkpoint before it; None: there was none."""
    missing: str
    """What the metric log has lost (`missing_rows`)."""


def write_outcome(job: DitJob) -> DitOutcome:
    """Write tables, numbers and figure of a finished run beside its weights.

    Files in `job.export_dir`: `history.csv`, `validation.csv`, `metrics.json`, `curves.png`.
    """
    # Lines of a longer run that this state was made by do not belong to the result.
    rows = [row for row in MetricLog(job.metrics).rows() if row["step"] <= job.settings.steps]
    out = job.export_dir
    metrics = headline_metrics(rows, trained_span(job.settings, LatentStore(job.latents).index))
    rounding = None if job.transformer.quantisation == "none" else noted_rounding(job.state_dir)
    if rounding is not None:
        metrics |= rounding.metrics()
    tables = {"history.csv": history_table(rows), "validation.csv": validation_table(rows)}
    for name, table in tables.items():
        # The line ending is fixed: these files are hashed, and the default follows the system.
        write_text(out / name, table.to_csv(index=False, lineterminator="\n"))
    draw_curves(rows, job.name, out / "curves.png")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    waits = sum(1 for row in rows if WAIT_WARNING in row)
    stalls = [row[CHECKPOINT_STALL] for row in rows if CHECKPOINT_STALL in row]
    stall_s = statistics.median(stalls) if stalls else None
    return DitOutcome(
        metrics,
        _digests(job),
        waits,
        tuple(restarts(job.state_dir)),
        tuple(noted_hand_overs(job.state_dir)),
        read_events(job.state_dir),
        stall_s,
        missing_rows(rows, job.settings.steps),
    )


def _digests(job: DitJob) -> dict[str, str]:
    """Identities by the names under which a run's lineage records them."""
    found = {
        "latents.digest": LatentStore(job.latents).digest,
        "text_embeddings.digest": TextStore(job.texts).digest,
        **{f"weights.{name}": folder_digest(job.export_dir / name) for name in WEIGHTS_NAMES},
    }
    # Stage 2 trains on part of the store, so the store's digest does not say on how many.
    if job.train_slice is not None:
        found["train_slice.images"] = str(len(pd.read_parquet(job.train_slice)))
    return found
