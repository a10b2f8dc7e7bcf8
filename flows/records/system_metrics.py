"""What the machine does while a stage runs: MLflow's system metrics, through the metric file.

MLflow's own monitor writes to the server from the training process, which a slow server would hold
up; here a thread appends to a JSONL file that the uploader sends. Names are MLflow's, so that its
page "System metrics" shows them; those of the stage's own processes are added.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from components.telemetry.metric_log import MetricLog

_INTERVAL_S = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or 10.0)
_SETTLE_S = 1.0
"""Percentages are of the time since the last look, so the first sample waits."""
_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class SystemSampler:
    """One sample at a time; rates count from the previous one."""

    def __init__(self, folder: Path) -> None:
        """Begin to count.

        Args:
            folder: whose file system's room is watched.
        """
        self._folder = folder
        self._stage = psutil.Process()
        self._processes: dict[int, psutil.Process] = {}
        network = psutil.net_io_counters()
        self._received, self._sent = network.bytes_recv, network.bytes_sent
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Percentages 0 to 100 (of one core for the stage), megabytes of 10^6 bytes, watts."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - self._received) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self._sent) / 1e6,
            **self._of_stage(),
            **_of_gpus(),
        }
        return {f"system/{name}": round(value, 2) for name, value in values.items()}

    def _of_stage(self) -> dict[str, float]:
        """Sums over this process and those that it started, ranks and workers included."""
        found = {p.pid: p for p in (self._stage, *self._stage.children(recursive=True))}
        # The object remembers when it was looked at last.
        self._processes = {pid: self._processes.get(pid, p) for pid, p in found.items()}
        cpu, resident = 0.0, 0
        for process in self._processes.values():
            try:
                cpu += process.cpu_percent()
                resident += process.memory_info().rss
            except psutil.Error:
                continue  # it has just ended
        return {"stage_cpu_percentage": cpu, "stage_memory_megabytes": resident / 1e6}


def _of_gpus() -> dict[str, float]:
    """Of every GPU that the driver's own program lists; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INTERVAL_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return gpu_metrics(done.stdout) if done.returncode == 0 else {}


def gpu_metrics(text: str) -> dict[str, float]:
    """Metrics from nvidia-smi's lines of index, utilization, used and total MiB, watts.

    What a driver does not tell ("[N/A]") is left out.
    """
    values: dict[str, float] = {}
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        index, *numbers = cells
        busy, used, total, watts = (_number(cell) for cell in numbers)
        known = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * 2**20 / 1e6,
            "memory_usage_percentage": used / total * 100 if used is not None and total else None,
            "power_usage_watts": watts,
        }
        values |= {f"gpu_{index}_{n}": value for n, value in known.items() if value is not None}
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


@contextmanager
def watched(file: Path, folder: Path) -> Iterator[None]:
    """Sample into `file` every 10 s (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL) and at the end.

    Args:
        file: metric file; a resumed stage continues to count its samples.
        folder: whose file system's room is watched.
    """
    log = MetricLog(file)
    done = threading.Event()
    sampler = SystemSampler(folder)
    first = max((int(row["step"]) for row in log.rows()), default=-1) + 1

    def watch() -> None:
        step, wait_s = first, _SETTLE_S
        while True:
            last = done.wait(wait_s)
            try:
                log.log(sampler.sample(), step)
            except (psutil.Error, OSError):
                return  # the disk is full or /proc is closed to us: no reason to stop a stage
            if last:
                return
            step, wait_s = step + 1, _INTERVAL_S

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
