"""Formula and trace side by side, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def compare_stage(planned: StagePlan, settings: Settings, root: Path) -> list[Comparison]:
    """Trace one planned stage at its largest size; the fullest of its pieces is what was planned.

    Args:
        planned: the stage by formula.
        settings: that it was planned from.
        root: where relative weight folders start.

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
    # One line a stage: its other pieces need less, and have no formula of their own here.
    trace = max(ways[planned.stage](), key=lambda one: one.peak_bytes)
    return [Comparison(**vars(trace), formula_bytes=planned.memory.total)]
