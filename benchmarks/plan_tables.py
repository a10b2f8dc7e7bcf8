"""The tables of docs/plan.md: planned cost of every profile, as Markdown.

    python benchmarks/plan_tables.py

The page says what the figures mean.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("embedded", "single-gpu", "paper")
_SI = ("", "k", "M", "G", "T", "P", "E", "Z")


def si(value: float, unit: str) -> str:
    """Three significant digits with a decimal prefix, such as "1.25 PFLOP"."""
    power = 0
    while value >= 1000 and power < len(_SI) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{digits} {_SI[power]}{unit}"


def planned(profile: str) -> dict[str, Any]:
    """What `ultraflux plan` says of a profile."""
    command = [sys.executable, "-m", "flows.cli", "plan", "--profile", profile, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"{' '.join(command)}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    for profile in PROFILES:
        plan = planned(profile)
        print(f"## {profile}, {plan['images']:,} images ({plan['images_from']})\n")
        print(
            "| stage | items | FLOPs per item | total with validation | memory of one GPU "
            "| of one machine | disk | GPUs | GPU-hours at the paper's rate |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        for stage in plan["stages"]:
            item = sum(stage["flops_per_item"].values()) - stage["flops_per_item"]["recompute"]
            memory = si(stage["memory_bytes"], "B")
            if stage["processes_per_gpu"] > 1:
                memory += f" ({stage['processes_per_gpu']} processes)"
            hours = "-" if stage["gpu_hours"] is None else f"{stage['gpu_hours']:,.0f}"
            print(
                f"| {stage['stage']} | {stage['items']:,} | {si(item, 'FLOP')} "
                f"| {si(stage['model_flops'], 'FLOP')} | {memory} "
                f"| {si(stage['host_bytes'], 'B')} | {si(sum(stage['disk'].values()), 'B')} "
                f"| {stage['gpus']} | {hours} |"
            )
        sums = (f"{zero}: {si(sum(parts), 'B')}" for zero, parts in plan["states_by_zero"].items())
        print(f"\nWeights, gradients and optimizer on one GPU by ZeRO stage: {', '.join(sums)}.\n")


if __name__ == "__main__":
    main()
