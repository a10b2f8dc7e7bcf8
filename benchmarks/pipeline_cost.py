"""Wall time and peak memory of `make run` in a fresh clone, first and second time.

    python benchmarks/pipeline_cost.py [--target run] [--times 2]

Memory is the sum of proportional set sizes (shared pages counted once) over the whole process tree,
sampled twice a second.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.5


def tree_pss(process: psutil.Process) -> int:
    """Bytes held by a process and everything below it."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(target: str, clone: Path) -> tuple[float, int, int]:
    """(seconds, peak bytes, exit code) of `make TARGET`."""
    started = time.monotonic()
    log = (clone / f"{target}.log").open("wb")
    process = subprocess.Popen(["make", target], cwd=clone, stdout=log, stderr=log)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, tree_pss(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(SAMPLE_S)
    return time.monotonic() - started, peak, process.wait()


def main() -> None:
    """Clone, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="run", help="make target")
    parser.add_argument("--times", type=int, default=2, help="how often in the same clone")
    options = parser.parse_args()
    memory_gib = psutil.virtual_memory().total / 2**30
    print(f"{platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "ultraflux"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        print(f"{'make ' + options.target:<12}{'wall s':>10}{'peak GiB':>10}{'exit':>6}")
        for attempt in range(1, options.times + 1):
            seconds, peak, code = measure(options.target, clone)
            print(f"{attempt:<12}{seconds:>10.1f}{peak / 2**30:>10.2f}{code:>6}", flush=True)


if __name__ == "__main__":
    main()
