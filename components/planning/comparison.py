"""Formula and trace side by side, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.images.aspect_buckets import buckets
from components.planning.exact import (
    Trace,
    trace_generate,
    trace_latents,
    trace_text,
    trace_training,
    trace_vae,
)
from components.planning.model_shapes import networks
from components.planning.planner import StagePlan
from components.planning.stage_memory import largest
from components.planning.transformer import Transformer
from components.settings.schema import Settings


@dataclass(frozen=True)
class Comparison(Trace):
    """A trace, and what the plan's formula says of the same moment."""

    formula_bytes: int = 0
    """Of one process."""

    @property
    def difference(self) -> float:
        """Formula over trace, less one."""
        return self.formula_bytes / self.peak_bytes - 1


# What of a DiT stage's settings decides its memory; the trace of an equal step serves again.
_DECIDES = (
    "adapter",
    "ema_device",
    "global_batch_size",
    "gradient_checkpointing",
    "micro_batch_size",
    "offload_activations",
    "offload_base",
    "offload_optimizer",
    "optimizer",
    "precision",
    "zero_stage",
)


def compare_stage(
    planned: StagePlan, settings: Settings, root: Path, before: dict[Any, Trace]
) -> Comparison:
    """Trace one planned stage at its largest size; the fullest of its pieces is what was planned.

    Args:
        planned: the stage by formula.
        settings: that it was planned from.
        root: where relative weight folders start.
        before: traces of training steps so far, added to: two stages are often alike.

    Raises:
        ImportError: something that the stage needs is not installed.
        ValueError: the settings need something that cannot be traced.
    """
    transformer = Transformer(networks(settings, root), settings)
    size = largest([(one.height, one.width) for one in buckets(settings.buckets)])
    picture = largest(settings.generate.sizes)
    ways: dict[str, Callable[[], list[Trace]]] = {
        "latents": lambda: trace_latents(transformer, size),
        "text_embeddings": lambda: trace_text(transformer),
        "vae": lambda: trace_vae(transformer),
        "dit_stage1": lambda: trace_training(transformer, "dit_stage1", size),
        "dit_stage2": lambda: trace_training(transformer, "dit_stage2", size),
        "generate": lambda: trace_generate(transformer, picture),
    }
    key: Any = planned.stage
    if planned.stage.startswith("dit_"):
        stage = getattr(settings, planned.stage)
        key = tuple(getattr(stage, name) for name in _DECIDES)
    if key not in before:
        # One line a stage: its other pieces need less, and have no formula of their own here.
        before[key] = max(ways[planned.stage](), key=lambda one: one.peak_bytes)
    found = vars(before[key]) | {"stage": planned.stage}
    if before[key].stage != planned.stage:
        found["seconds"] = 0.0
    return Comparison(**found, formula_bytes=planned.memory.total)
