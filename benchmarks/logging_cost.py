"""What the metric log costs a training step.

    python benchmarks/logging_cost.py [--steps 80]

One real run of the trainer at the embedded size; its metric log is taken away at every other step.
A step's time is the CPU time of the training thread from its batch to the line in the file, on one
core. Two numbers come out: the medians of steps with and without a line, in alternation (their
difference is small beside the spread of steps on a shared machine), and the time inside
`MetricLog.log` itself, as a share of the step (goal: at most 1%). Sending lines to MLflow is
another process's work and is not in a step: training waits for the file only.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from trainer_overhead import WARM_UP, make_job, write_stores

from components.telemetry.metric_log import MetricLog
from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.dit.assembly import assemble_run
from components.training.dit.job import DitJob
from components.training.dit.trainer import DitTrainer


class TimedLog(MetricLog):
    """Adds up what it costs."""

    spent_s: float = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """As the base."""
        begun = time.thread_time()
        super().log(metrics, step)
        self.spent_s = time.thread_time() - begun


class AlternatingTrainer(DitTrainer):
    """The real trainer with a metric log at every other step."""

    def __init__(self, job: DitJob, ranks: Ranks) -> None:
        super().__init__(assemble_run(job, ranks))
        self.log_file = TimedLog(job.metrics)
        self.metrics = self.log_file
        self.with_line: list[float] = []
        self.without_line: list[float] = []
        self.line: list[float] = []
        self._begun = 0.0

    def _validate_and_save(self) -> None:
        took = time.thread_time() - self._begun
        if self.step > WARM_UP:
            (self.without_line if self.metrics is None else self.with_line).append(took)
            if self.metrics is not None:
                self.line.append(self.log_file.spent_s)
        self.metrics = self.log_file if self.metrics is None else None
        self._begun = time.thread_time()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}, torch {torch.__version__}")
    with (
        tempfile.TemporaryDirectory() as folder,
        deterministic_torch(1),
        open_ranks("cpu") as ranks,
    ):
        write_stores(Path(folder))
        trainer = AlternatingTrainer(make_job(Path(folder), "embedded", options.steps), ranks)
        trainer.run()
        trainer.parts.checkpoints.writer.close()
    step, bare, line = (
        1000 * statistics.median(values)
        for values in (trainer.with_line, trainer.without_line, trainer.line)
    )
    print(f"steps with a line {step:.2f} ms, without {bare:.2f} ms: ratio {step / bare:.4f}")
    print(f"a line {line:.3f} ms: {line / bare:.2%} of a step")


if __name__ == "__main__":
    main()
