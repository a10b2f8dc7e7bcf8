"""GPU-hours and cost: what a stage held its GPUs for, and their sum over a pipeline run.

A GPU counts while a stage holds it, busy or not, because that is what one pays for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from components.settings.runtime import RuntimeSettings
from flows.records.records import RunResult

GPU_HOURS, COST = "gpu_hours", "cost"


def gpu_hours(seconds: float, gpus: int) -> float:
    """Hours times devices."""
    return seconds * gpus / 3600


def cost_metrics(hours: float, price: float | None) -> dict[str, float]:
    """MLflow metrics `gpu_hours` and, where a price per GPU-hour is set, `cost` in its currency."""
    return {GPU_HOURS: hours} | ({} if price is None else {COST: hours * price})


def with_cost(result: RunResult, seconds: float, gpus: int, runtime: RuntimeSettings) -> RunResult:
    """`result` with what its GPUs cost; unchanged where it used none."""
    if gpus == 0:
        return result
    spent = cost_metrics(gpu_hours(seconds, gpus), runtime.gpu_hour_price)
    return replace(result, metrics={**result.metrics, **spent})


def pipeline_cost(
    seconds: Mapping[str, float], gpus: Mapping[str, int], price: float | None
) -> dict[str, float]:
    """Metrics of a pipeline run.

    Args:
        seconds: how long each stage ran in this pipeline run, by name.
        gpus: devices that each stage holds, by name.
        price: of a GPU-hour.
    """
    return cost_metrics(sum(gpu_hours(s, gpus[name]) for name, s in seconds.items()), price)
