"""Text embeddings by `build_text_store` against two plain loops, in alternation.

    python benchmarks/text_caching.py [--captions 2560] [--rounds 5]

The bundled captions, numbered so that all differ, through tiny T5 and CLIP encoders in the true
architecture, in batches of 16 on `--threads` threads of torch. The loops keep a file per caption,
or all embeddings in memory and one file at the end; they journal, hash and share nothing. A ratio
is of two times of one round: of ours, and of the faster loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from folder_ways import over_fastest, seconds_in_alternation
from safetensors.torch import save_file
from torch import Tensor
from verdicts import Verdict, conclude

from components.models.text_encoders import build_tiny_text_encoders, encode_prompts
from components.training.distributed.ranks import deterministic_torch
from components.training.stores.text_store import build_text_store, embedded_prompts

ROOT = Path(__file__).resolve().parents[1]
TOKENS, BATCH = 64, 16
Embedded = tuple[Tensor, Tensor]


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    lines = (ROOT / "data" / "sample" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    bundled = [json.loads(line)["caption_en"] for line in lines]
    captions = {
        f"{number:064x}": f"{bundled[number % len(bundled)]} Variant {number}."
        for number in range(options.captions)
    }
    with tempfile.TemporaryDirectory() as temporary:
        encoders = build_tiny_text_encoders(Path(temporary) / "encoders", bundled)

        def encode(prompts: list[str]) -> Embedded:
            with torch.no_grad():
                return encode_prompts(encoders, prompts, max_sequence_length=TOKENS)

        def ours(out: Path) -> None:
            build_text_store(
                out / "work",
                out / "store",
                captions,
                lambda plan: (embedded_prompts(batch, encode, "float32") for batch in plan),
                encoder_digest="tiny",
                dtype="float32",
                batch_size=BATCH,
            )

        def loop(out: Path, keep: Callable[[Path, list[str], list[Embedded]], None]) -> None:
            names = list(captions)
            found = [
                encode([captions[name] for name in names[at : at + BATCH]])
                for at in range(0, len(names), BATCH)
            ]
            keep(out, names, found)

        ways: dict[str, Callable[[Path], None]] = {
            "build_text_store": ours,
            "a file per caption": partial(loop, keep=a_file_each),
            "one file": partial(loop, keep=one_file),
        }
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
            f"{len(captions)} captions, {options.threads} threads of torch"
        )
        with deterministic_torch(options.threads):
            kept = seconds_in_alternation(ways, options.rounds, Path(temporary), time.process_time)
    for name, times in kept.items():
        print(f"{name:20} {len(captions) / statistics.median(times):7.1f} captions a CPU second")
    ratios = over_fastest(kept, "build_text_store")
    return conclude([Verdict("texts: time / faster of two loops", ratios, 1.05)])


def a_file_each(out: Path, names: list[str], found: list[Embedded]) -> None:
    """As tutorials do."""
    each = [pair for batch in found for pair in zip(*batch, strict=True)]
    for name, (states, pooled) in zip(names, each, strict=True):
        tensors = {"states": states.clone(), "pooled": pooled.clone()}
        save_file(tensors, out / f"{name}.safetensors")


def one_file(out: Path, names: list[str], found: list[Embedded]) -> None:
    """Nothing until the end, then all of it."""
    states, pooled = (torch.cat(part) for part in zip(*found, strict=True))
    save_file({"states": states, "pooled": pooled}, out / "all.safetensors")


if __name__ == "__main__":
    sys.exit(main())
