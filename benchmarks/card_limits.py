"""Does the 12B network at 4096x4096 stay within one card? Formula and trace beside the limits.

    python benchmarks/card_limits.py [--row TEXT]

The stages' own code on fake tensors (`ultraflux plan --exact`), the `single-gpu` profile with what
a row says; training is an adapter of rank 64 at batch 1. Ends with 1 where a row is beyond its
limit. Nothing is timed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.planning import exact  # noqa: E402
from components.planning.advice import Changes, changed  # noqa: E402
from components.planning.memory import GIB  # noqa: E402
from components.planning.model_shapes import networks  # noqa: E402
from components.planning.stage_memory import stage_memory  # noqa: E402
from components.planning.transformer import Transformer  # noqa: E402
from components.settings.schema import parse_settings  # noqa: E402
from flows.versioning.profiles import composed  # noqa: E402

SIZE = (4096, 4096)
_INT8 = {f"models.{part}.quantisation": "int8" for part in ("transformer", "text_encoders")}
_OFFLOADED = ["text-first", "block-offload"]


@dataclass(frozen=True)
class Row:
    """What has to fit."""

    stage: str
    what: str
    changes: Changes
    limit_gib: float


ROWS = (
    Row("dit_stage1", "training, int8 base", {"models.transformer.quantisation": "int8"}, 22.5),
    Row("dit_stage1", "training, nf4 base", {"models.transformer.quantisation": "nf4"}, 17.0),
    Row(
        "generate",
        "sampling, int8, tiled decode",
        {"generate.memory": ["text-first", "vae-tiling"], **_INT8},
        15.0,
    ),
    Row("generate", "sampling, block-offload", {"generate.memory": _OFFLOADED}, 15.0),
    Row(
        "generate",
        "sampling, block-offload, tiled decode",
        {"generate.memory": [*_OFFLOADED, "vae-tiling"]},
        8.0,
    ),
)


def needed(row: Row) -> tuple[float, float]:
    """(formula, trace) of the fullest moment, in GiB."""
    settings = parse_settings(composed(ROOT, "single-gpu"))
    with tempfile.TemporaryDirectory() as no_weights:
        given = Transformer(networks(settings, Path(no_weights)), settings)
    subject = changed(given, {"generate.sizes": [list(SIZE)], **row.changes})
    if subject is None:
        raise ValueError(f"{row.what}: settings that cannot be")
    planned = stage_memory(row.stage, subject, [SIZE]).gpu_bytes
    if row.stage == "generate":
        traces = exact.trace_generate(subject, SIZE)
    else:
        stage = subject.settings.dit_stage1
        if stage.adapter is None or (stage.adapter.rank, stage.micro_batch_size) != (64, 1):
            raise ValueError("single-gpu: no adapter of rank 64 at batch 1")
        traces = exact.trace_training(subject, row.stage, SIZE)
    return planned / GIB, max(one.peak_bytes for one in traces) / GIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="", help="those that begin so (default: all)")
    wanted = [row for row in ROWS if row.what.startswith(parser.parse_args().row)]
    if not wanted:
        parser.error(f"--row: choose from {', '.join(row.what for row in ROWS)}")
    beyond = 0
    print("| 4096x4096, 12B | formula GiB | trace GiB | limit GiB | |\n|---|---|---|---|---|")
    for row in wanted:
        planned, traced = needed(row)
        fits = max(planned, traced) <= row.limit_gib
        beyond += not fits
        verdict = "within" if fits else "BEYOND"
        print(
            f"| {row.what} | {planned:.2f} | {traced:.2f} | {row.limit_gib} | {verdict} |",
            flush=True,
        )
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
