"""Training disturbed in every way we could think of, against the same training left alone.

    python benchmarks/fault_table.py [--out docs/faults.md] [--kills 3] [--only PREFIX] [--steps 20]

Real processes, real signals, a real full file system (a tmpfs, which needs root; that row is left
out otherwise). What is compared: every byte of both exports and of the last checkpoint, and every
logged metric that is not a measurement of the machine. Ends with an error when a row differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from synthetic_job import make_job, write_stores

from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoints import CheckpointStore
from components.training.dit.job import DitJob
from components.training.dit.throughput import MACHINE_METRICS

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 5
PATIENCE_S = 300.0
WORKER = "components.training.dit.worker"
DRILLS = "## Drills"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    disturbance: str
    ended: str
    """How the disturbed process ended, in its own words."""
    came_back: str
    digest: str


def digest(job: DitJob) -> str:
    """Of everything that a run leaves: exports, last checkpoint, metrics."""
    summed = hashlib.sha256()
    newest = CheckpointStore(job.state_dir / "checkpoints", keep=2).latest()
    assert newest is not None
    for folder in (job.export_dir, newest[1]):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            summed.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    for row in MetricLog(job.metrics).rows():
        lasting = {key: value for key, value in row.items() if key not in MACHINE_METRICS}
        summed.update(json.dumps(lasting, sort_keys=True).encode())
    return summed.hexdigest()[:16]


LAUNCHER = """
import pathlib, sys
from components.training.dit.worker import run_job
from components.training.dit.job import DitJob
run_job(DitJob.model_validate_json(pathlib.Path(sys.argv[1]).read_text(), strict=False))
"""


def start(job: DitJob) -> subprocess.Popen[str]:
    """The job in a process of its own; several ranks under their launcher."""
    job.state_dir.mkdir(parents=True, exist_ok=True)
    path = job.state_dir / "job.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", WORKER, str(path)]
    if job.runtime.processes > 1:
        command = [sys.executable, "-c", LAUNCHER, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A file, so that nobody has to empty a pipe while we watch.
    with (job.state_dir / "stderr.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=log, text=True
        )


def last_words(job: DitJob) -> str:
    """The error line of the process that ended last, without paths of this machine."""
    lines = (job.state_dir / "stderr.log").read_text(encoding="utf-8").strip().splitlines()
    errors = [line for line in lines if "Error" in line or "Failed" in line or "Diverged" in line]
    errors += [line for line in lines if "DiskFull" in line]
    words = (errors or lines or ["nothing"])[-1]
    for folder in (str(job.state_dir.resolve()), str(job.state_dir)):
        words = words.replace(folder, "STATE")
    return words.split(".", 2)[-1] if words.startswith("components.") else words


def finish(job: DitJob) -> None:
    """Run the job to its end."""
    process = start(job)
    if process.wait(PATIENCE_S):
        raise SystemExit(f"the job did not come back: {last_words(job)}")


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def logged_steps(job: DitJob) -> int:
    """Steps in the metric log."""
    return len(MetricLog(job.metrics).series("loss")[0]) if job.metrics.exists() else 0


def newest_step(job: DitJob) -> int | None:
    """Step of the newest whole checkpoint."""
    newest = CheckpointStore(job.state_dir / "checkpoints", keep=2).latest()
    return newest[0] if newest else None


def is_writing(job: DitJob) -> bool:
    """Whether a checkpoint is half written."""
    return any((job.state_dir / "checkpoints").glob(".writing-*"))


def came_back(job: DitJob) -> str:
    """What the next start finds."""
    step = newest_step(job)
    return "from the start" if step is None else f"from step {step}"


class Table:
    """Runs disturbances and collects the rows."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.rows: list[Row] = []
        self.expected: dict[int, str] = {}
        write_stores(folder, latent_px=8)

    def job(self, name: str, processes: int = 1, **stage: object) -> DitJob:
        """A fresh job, or the same one under other settings."""
        small: dict[str, object] = {
            "steps": self.steps,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "validate_every": 10,
            "validation_repeats": 1,
            "checkpoint_every": SAVE_EVERY,
        }
        return make_job(
            self.folder,
            self.folder / name,
            heads=2,
            layers=1,
            stage=small | stage,
            # Long enough for the imports of a loaded machine.
            runtime={
                "processes": processes,
                "torch_threads": 1,
                "max_restarts": 2,
                "collective_timeout_minutes": 1.0,
            },
        )

    def undisturbed(self, processes: int) -> str:
        """Hash of the run that nothing happens to."""
        if processes not in self.expected:
            job = self.job(f"undisturbed-{processes}", processes)
            finish(job)
            self.expected[processes] = digest(job)
            name = "none" if processes == 1 else f"none, {processes} processes"
            self.add(Row(name, "", "", self.expected[processes]))
        return self.expected[processes]

    def add(self, row: Row) -> None:
        """Keep and show a row."""
        self.rows.append(row)
        print(f"{row.disturbance} | {row.ended} | {row.came_back} | {row.digest}", flush=True)

    def close(self, job: DitJob, row: Row) -> None:
        """Finish the disturbed job and compare."""
        expected = self.undisturbed(job.runtime.processes)
        finish(job)
        found = digest(job)
        self.add(replace(row, digest=found if found == expected else f"DIFFERS {found}"))

    def kill_at(self, job: DitJob, step: int) -> bool:
        """SIGKILL once `step` steps are logged."""
        process = start(job)
        reached = wait_until(process, lambda: logged_steps(job) >= step)
        process.kill()
        process.wait()
        return reached

    def kills(self, count: int) -> None:
        """SIGKILL at random steps; the last of them twice."""
        rng = random.Random(1)
        for number in range(count):
            job, step = self.job(f"kill-{number}"), rng.randrange(1, self.steps)
            assert self.kill_at(job, step)
            found, name = came_back(job), f"SIGKILL after step {step}"
            if number == count - 1:
                step = rng.randrange((newest_step(job) or 0) + 1, self.steps)
                assert self.kill_at(job, step)
                name += f", and again after step {step}"
                found += f", then {came_back(job)}"
            self.close(job, Row(name, "SIGKILL", found, ""))

    def kill_while_writing(self) -> None:
        """SIGKILL while the second checkpoint is half written."""
        for attempt in range(5):
            job = self.job(f"writing-{attempt}")
            process = start(job)
            wait_until(process, lambda job=job: is_writing(job) and newest_step(job) is not None)
            process.kill()
            process.wait()
            if is_writing(job):
                left = next((job.state_dir / "checkpoints").glob(".writing-*")).name
                self.close(job, Row("SIGKILL in the background write", left, came_back(job), ""))
                return
        raise SystemExit("no kill met a checkpoint being written")

    def full_disk(self) -> None:
        """A file system with room for one checkpoint and a half."""
        self.undisturbed(1)
        whole = self.folder / "undisturbed-1" / "state" / "checkpoints"
        size = sum(file.stat().st_size for file in next(whole.glob("step-*")).rglob("*.*"))
        job = self.job("full")
        place = job.state_dir / "checkpoints"
        with small_file_system(place, size * 3 // 2) as mounted:
            if not mounted:
                return
            process = start(job)
            assert process.wait(PATIENCE_S) != 0
            words, found = last_words(job), came_back(job)
            kept = self.folder / "kept"
            shutil.copytree(place, kept)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        self.close(job, Row("disk full during a checkpoint", words, found, ""))

    def not_finite(self) -> None:
        """A learning rate that makes the loss overflow, then the right one again."""
        job = self.job("diverged")
        assert self.kill_at(job, SAVE_EVERY + 2)
        wrong = self.job("diverged", learning_rate=1e30, schedule="constant", max_grad_norm=1e30)
        process = start(wrong)
        assert process.wait(PATIENCE_S) != 0
        words, saved = last_words(wrong), list((job.state_dir / "diverged").rglob("*.safetensors"))
        assert saved, "the batch was not saved"
        self.close(job, Row("loss not finite", words, came_back(job), ""))

    def signal_rank(self, number: signal.Signals) -> None:
        """One of two ranks is killed or stopped; the launcher brings all of them back."""
        expected = self.undisturbed(2)
        job = self.job(f"pair-{number.name}", 2)
        process = start(job)
        assert wait_until(process, lambda: logged_steps(job) >= SAVE_EVERY + 2), last_words(job)
        found = came_back(job)
        torchrun = psutil.Process(process.pid).children()[0]
        ranks = [child for child in torchrun.children() if WORKER in child.cmdline()]
        os.kill(ranks[-1].pid, number)
        assert process.wait(PATIENCE_S) == 0, last_words(job)
        log = (job.state_dir / "restarts.jsonl").read_text(encoding="utf-8").splitlines()
        reasons = "; ".join(json.loads(line)["reason"] for line in log)
        result = digest(job)
        result = result if result == expected else f"DIFFERS {result}"
        self.add(
            Row(f"{number.name} to one of two processes", f"restart: {reasons}", found, result)
        )


@contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of `size` bytes at `folder`; False where mounting is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def page(rows: list[Row], command: str) -> str:
    """The table as Markdown."""
    lines = [
        "# Faults and what came back",
        "",
        f"Written by `{command}` (torch on CPU, Python {platform.python_version()}, "
        f"{platform.machine()}). The hash covers both exports, the last checkpoint and all metrics "
        "that do not measure the machine; it must be that of the undisturbed run.",
        "",
        "| disturbance | how it ended | continued | hash |",
        "|---|---|---|---|",
    ]
    cells = ([row.disturbance, row.ended, row.came_back, f"`{row.digest}`"] for row in rows)
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all disturbances and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="kill, writing, full, diverged or pair")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Table(Path(folder), options.steps)
        todo: dict[str, Callable[[], None]] = {
            "kill": lambda: table.kills(options.kills),
            "writing": table.kill_while_writing,
            "full": table.full_disk,
            "diverged": table.not_finite,
            "pair-kill": lambda: table.signal_rank(signal.SIGKILL),
            "pair-stop": lambda: table.signal_rank(signal.SIGSTOP),
        }
        for name, disturb in todo.items():
            if name.startswith(options.only):
                disturb()
    if options.out is not None:
        # What stands below belongs to `ultraflux chaos`.
        before = options.out.read_text("utf-8") if options.out.is_file() else ""
        kept = before[before.index(DRILLS) :] if DRILLS in before else ""
        text = page(table.rows, "python benchmarks/fault_table.py")
        options.out.write_text(f"{text}\n{kept}" if kept else text, "utf-8")
    if any(row.digest.startswith("DIFFERS") for row in table.rows):
        raise SystemExit("a disturbed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
