"""The short benchmarks with targets, one after the other; what `make bench` runs.

    python benchmarks/bench.py [--only NAME ...]

Each measures in alternation inside one process, with one thread where a core is meant, and says of
each target whether it is kept. The verdicts go to `benchmarks/results.json` and, as a table, to
`docs/benchmarks.md`. Exit code 1: a target is missed by every round of its benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from verdicts import RESULTS

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "benchmarks.md"
MEASURED = ROOT / "benchmarks" / "results.json"
SHORT: dict[str, str] = {
    "signals": "corpus_signals.py --rounds 5",
    "glcm": "glcm_suite.py --images 5",
    "engine": "corpus_engine.py --items 1000 --repeats 5",
    "objective": "objective_cost.py --device cpu --batches 1 4",
    "latents": "latent_caching.py",
    "texts": "text_caching.py",
    "store": "store_reading.py --gib 0.5 --batches 20",
    "trainer": "trainer_overhead.py --steps 30 --sizes embedded --zero-stage 0",
    "trainer, ZeRO 2": "trainer_overhead.py --steps 30 --sizes embedded --zero-stage 2",
}
"""Command of each, below benchmarks/; together within ten minutes on two cores."""


def run(name: str) -> tuple[list[dict[str, Any]], int]:
    """Verdicts and exit code of one benchmark; its output goes to the terminal."""
    script, *options = SHORT[name].split()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "verdicts.jsonl"
        code = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / script), *options],
            cwd=ROOT,
            env=os.environ | {RESULTS: str(found), "OMP_NUM_THREADS": "1"},
        ).returncode
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    return [json.loads(line) | {"benchmark": name} for line in lines], code


def table(results: dict[str, Any]) -> str:
    """The page about the last results."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, which exits with 1 when a target is missed. Ratios of work in "
        "alternation inside one process: median of the rounds, smallest and largest. *Undecided*: "
        "the median misses the target and some rounds keep it.",
        "",
        f"Last run: {results['machine']}.",
        "",
        "| ratio | measured | target | | load | command |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["verdicts"]:
        sign = "≤" if row["at_most"] else "≥"
        lines.append(
            f"| {row['name']} | {row['median']:.3g} ({row['low']:.3g} to {row['high']:.3g}) "
            f"| {sign} {row['target']:g} | {row['outcome']} | {row['load']:g} "
            f"| `python benchmarks/{SHORT[row['benchmark']]}` |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, write both files; 1 where a target is missed, 2 where a benchmark did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SHORT), default=list(SHORT))
    options = parser.parse_args()
    before = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    kept = [v for v in before.get("verdicts", []) if v["benchmark"] not in options.only]
    broken = []
    for name in options.only:
        print(f"== {name}: python benchmarks/{SHORT[name]}", flush=True)
        verdicts, _ = run(name)
        kept += verdicts
        if not verdicts:
            broken.append(name)
    order = list(SHORT)
    kept.sort(key=lambda row: order.index(row["benchmark"]))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results = {"machine": machine, "verdicts": kept}
    MEASURED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(table(results), encoding="utf-8")
    if broken:
        print(f"error: no verdict of {', '.join(broken)}: see above", file=sys.stderr)
        return 2
    return int(any(row["outcome"] == "missed" for row in kept))


if __name__ == "__main__":
    sys.exit(main())
