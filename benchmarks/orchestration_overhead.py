"""What Prefect, DVC and MLflow add to a stage, in a clone whose stages copy one small file.

    python benchmarks/orchestration_overhead.py [--stages 3] [--rounds 3]

In every round, one after the other: the bare stage functions in an interpreter each, then with each
engine a pipeline without anything to do and one with every stage forced. Overhead of a stage =
(forced - nothing to do) / stages - bare; what a pipeline costs as such is the second figure. The
servers and one worker per pool run all the time. Beside wall time stands the CPU time of the
command and its children (for pools the workers' share is missing there: only wall time counts).
Goals: 3 s a stage locally, 10 s through a pool, 10 s for a pipeline without anything to do, 500 MiB
for the process of the pipeline flow.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from trivial_clone import trivial_clone

from flows.services.servers import free_port

SAMPLE_S = 0.2
ENGINES = ("local", "prefect", "pools")
BARE = """
import sys
from pathlib import Path
from importlib import import_module
from components.settings.schema import load_settings
from flows.stages.contract import StageContext
root = Path.cwd()
name = sys.argv[1]
for old in (root / "data" / name).glob("out"):
    old.unlink()
context = StageContext(name, load_settings(root / "params.yaml"), root, root / "runs", None)
import_module(f"flows.stages.{name}").run(context)
"""


@dataclass(frozen=True)
class Cost:
    """Of one command."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(command: list[str], clone: Path, env: dict[str, str]) -> Cost:
    """Run a command that has to succeed."""
    before = os.times()
    began = time.monotonic()
    with (clone / "benchmark.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=clone, env=env, stdout=log, stderr=log)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(SAMPLE_S)
        code = process.wait()
    wall = time.monotonic() - began
    if code:
        sys.exit(f"{' '.join(command)}: exit {code}\n{(clone / 'benchmark.log').read_text()}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user
    cost = Cost(wall, cpu - before.children_system, peak)
    said = " ".join(word for word in command[:6] if "\n" not in word)
    print(
        f"  {said}: {cost.wall_s:.2f} s wall, {cost.cpu_s:.2f} s CPU, {peak / 2**20:.0f} MiB, "
        f"load {os.getloadavg()[0]:.1f}",
        file=sys.stderr,
        flush=True,
    )
    return cost


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = parser.parse_args()
    # As Ctrl-C: the servers are stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = trivial_clone(Path(folder), options.stages)
        env = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
        programs = str(Path(sys.executable).parent)
        env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
        ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
        measure(["ultraflux", "up", *ports, "--workers"], clone, env)
        names = ["ingest", *(f"copy{number}" for number in range(1, options.stages))]
        try:
            for engine in options.engines:
                # Caches of bytecode and databases: not part of any figure.
                measure(["ultraflux", "run", "--engine", engine, "--force"], clone, env)
            for _ in range(options.rounds):
                for name in names:
                    found.setdefault("bare", []).append(
                        measure([sys.executable, "-c", BARE, name], clone, env)
                    )
                for engine in options.engines:
                    command = ["ultraflux", "run", "--engine", engine]
                    found.setdefault(f"{engine} nothing", []).append(measure(command, clone, env))
                    found.setdefault(f"{engine} forced", []).append(
                        measure([*command, "--force"], clone, env)
                    )
        finally:
            subprocess.run(["ultraflux", "down"], cwd=clone, env=env, stdout=subprocess.DEVNULL)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    memory_gib = psutil.virtual_memory().total / 2**30
    print(f"{platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, load {load}")
    print(f"{options.stages} stages, {options.rounds} rounds; median (least) of the rounds")
    print(f"bare stage: {spread([cost.wall_s for cost in found['bare']])} s wall")
    print(f"{'engine':<9}{'per stage s':>16}{'CPU s':>15}{'nothing to do s':>20}{'peak MiB':>10}")
    bare = found["bare"]
    for engine in options.engines:
        nothing, forced = found[f"{engine} nothing"], found[f"{engine} forced"]
        pairs = list(zip(forced, nothing, strict=True))
        least = min(cost.wall_s for cost in bare)
        wall = [(f.wall_s - n.wall_s) / options.stages - least for f, n in pairs]
        cpu = [(f.cpu_s - n.cpu_s) / options.stages - bare[0].cpu_s for f, n in pairs]
        peak = max(cost.peak_bytes for cost in forced) / 2**20
        idle = spread([cost.wall_s for cost in nothing])
        print(f"{engine:<9}{spread(wall):>16}{spread(cpu):>15}{idle:>20}{peak:>10.0f}")


def spread(values: list[float]) -> str:
    """Median and least."""
    return f"{statistics.median(values):.2f} ({min(values):.2f})"


if __name__ == "__main__":
    main()
