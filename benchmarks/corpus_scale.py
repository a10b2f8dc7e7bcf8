"""Many small photographs through every stage of the corpus, by the command that a person types.

    python benchmarks/corpus_scale.py --sizes 500 5000 50000

    python benchmarks/corpus_scale.py --sizes 0     (the bundled photographs at their full sizes)
    python benchmarks/corpus_scale.py --sizes 5000 15000 50000 --until source     (the first stage)

For each size: a fresh clone of the last commit, that many distinct small photographs, and
`ultraflux run --until slices --no-rehearsal`. The photographs are cut at random from the bundled
ones (256 px and less; JPEG, PNG and WebP), each with its caption in a text file beside it. Rules on
sizes and texture are off, because small cuts of photographs are meant to get through.

Per stage: CPU seconds of its process and all that it starts, and the largest sum of their resident
sizes (shared pages count in each of them: an upper bound). Libraries are imported once for all
stages: that is in the whole command's seconds alone, which are read four times a second, so that
the last moments of each process are missing. "ms a row" is the slope between two
sizes, so that the start of a process does not count. Exit code 1: in some stage or in all
together, the slope between the two largest sizes is more than 1.1 times the one before, and by more
than 0.3 s of difference between starts can make of it; or a stage peaks at 2 GiB or more. Slopes
below 0.1 ms count as 0.1 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import small_project
from process_tree import command_environment, family, readings
from process_tree import words as words_of

ROOT = Path(__file__).resolve().parents[1]
MOST_GROWTH, MOST_GIB = 1.1, 2.0
_READ_EVERY_S = 0.25
# The start of a process takes so much more or less from one size to the next; less a row than
# SMALLEST_MS cannot be told from that.
START_S = 0.3
SMALLEST_MS = 0.1
STAGES = ("source", "ingest", "signals", "quality", "people", "select", "caption")
STAGES += ("validate", "slices")
FILES_PER_FOLDER = 1_000
SETTINGS = {
    "ingest.source": "photos",
    "ingest.attribution": None,
    "select.min_pixels": 1024,
    "select.max_flat_fraction": 1.0,
    "select.min_entropy_bits": 0.0,
    "select.human.min_entropy_bits": None,
    "people.boxes": None,
}
# Of ten photographs.
KINDS = (".jpg",) * 8 + (".png", ".webp")


def make_photographs(folder: Path, count: int, seed: int = 0) -> None:
    """`count` cuts of the bundled photographs and their captions; the same for the same seed."""
    sample = ROOT / "data" / "sample"
    lines = (sample / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = {one["file"]: one["caption_en"] for one in map(json.loads, lines)}
    cv2.setNumThreads(1)
    photographs = []
    for file in sorted(captions):
        pixels = cv2.imread(str(sample / file), cv2.IMREAD_REDUCED_COLOR_2)
        photographs.append((captions[file], pixels))
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        caption, pixels = photographs[number % len(photographs)]
        edges = rng.integers(120, 257, 2)
        # At most twice enlarged and at most three times shrunk.
        scale = rng.uniform(0.5, min(3.0, *(np.array(pixels.shape[:2]) / edges)))
        height, width = (int(edge * scale) for edge in edges)
        top, left = (
            int(rng.integers(0, room + 1)) for room in np.array(pixels.shape[:2]) - (height, width)
        )
        cut = pixels[top : top + height, left : left + width]
        small = cv2.resize(cut, tuple(int(edge) for edge in edges[::-1]), None, 0, 0, 3)
        inner = folder / f"{number // FILES_PER_FOLDER:03}"
        inner.mkdir(parents=True, exist_ok=True)
        file = inner / f"{number:06}{KINDS[number // len(photographs) % len(KINDS)]}"
        cv2.imwrite(str(file), small[:, :: rng.choice((-1, 1))])
        text = f"Photograph {number} of a series of {count} cuts. {caption}"
        file.with_suffix(".txt").write_text(text, encoding="utf-8")


def stage_of(pid: int) -> str:
    """The stage that a process is; empty where it is none."""
    said = words_of(pid)
    place = said.index("stage") if "stage" in said else len(said)
    return said[place + 2] if said[place + 1 : place + 2] == ["run"] else ""


def watch(
    root: int, stop: threading.Event, found: dict[str, dict[str, float]], own_s: dict[int, float]
) -> None:
    """Keep the CPU seconds and the peak of every stage below `root`, and each process's seconds."""
    stages: dict[int, str] = {}
    for known in readings(_READ_EVERY_S, stop):
        for pid in family(root, known):
            own_s[pid] = max(own_s.get(pid, 0.0), known[pid].own_s)
            # A stage that was forked takes its name a moment later.
            if not stages.get(pid):
                stages[pid] = stage_of(pid)
            if name := stages[pid]:
                tree = [known[one] for one in family(pid, known)]
                row = found.setdefault(f"{name} {pid}", {"cpu_s": 0.0, "gib": 0.0})
                row["cpu_s"] = max(row["cpu_s"], sum(one.cpu_s for one in tree))
                row["gib"] = max(row["gib"], sum(one.resident for one in tree) / 2**30)


def measured(clone: Path, until: str) -> dict[str, dict[str, float]]:
    """CPU seconds and peak GiB by stage, and of the command as a whole."""
    # A rehearsal costs the same at every size.
    words = ["run", "--until", until, "--no-rehearsal"]
    command = [str(Path(sys.executable).with_name("ultraflux")), *words]
    environment = command_environment(clone)
    found: dict[str, dict[str, float]] = {}
    own_s: dict[int, float] = {}
    with (clone.parent / "said.log").open("w+", encoding="utf-8") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=clone, env=environment, stdout=said, stderr=said)
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, stop, found, own_s))
        watcher.start()
        status = process.wait()
        wall_s = time.monotonic() - started
        stop.set()
        watcher.join()
        if status:
            said.seek(0)
            sys.exit(said.read())
    stages: dict[str, dict[str, float]] = {}
    for key, row in found.items():
        # The command in dvc.yaml, the fork that does its work, and what that one forks.
        one = stages.setdefault(key.split()[0], {"cpu_s": 0.0, "gib": 0.0})
        for name in one:
            one[name] = max(one[name], row[name])
    stages["whole command"] = {
        "cpu_s": sum(own_s.values()),
        "gib": max(row["gib"] for row in stages.values()),
        "wall_s": wall_s,
    }
    return stages


def run_size(folder: Path, count: int, until: str) -> dict[str, Any]:
    """One size in a fresh clone; 0: the bundled photographs as they are, with their settings."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    if count:
        small_project.change_settings(clone, SETTINGS)
        make_photographs(clone / "photos", count)
    stages = measured(clone, until)
    summary = clone / "data" / "slices" / "summary.json"
    slices = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    return {"rows": count, "stages": stages, "slices": slices}


def slope_ms(name: str, fewer: dict[str, Any], more: dict[str, Any]) -> float:
    """CPU milliseconds of each row between two sizes."""
    seconds = more["stages"][name]["cpu_s"] - fewer["stages"][name]["cpu_s"]
    return 1e3 * seconds / (more["rows"] - fewer["rows"])


def report(runs: list[dict[str, Any]]) -> list[str]:
    """Print the table; what misses the target."""
    sizes = [run["rows"] for run in runs]
    columns = [f"CPU s, {rows}" for rows in sizes]
    columns += [f"ms a row, {a} to {b}" for a, b in pairwise(sizes)]
    columns += [f"GiB, {rows}" for rows in sizes]
    print(f"| stage | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    missed = []
    for name in (*STAGES, "whole command"):
        if name not in runs[0]["stages"]:
            continue
        rows = [run["stages"][name] for run in runs]
        slopes = [slope_ms(name, *pair) for pair in pairwise(runs)]
        cells = [f"{row['cpu_s']:.1f}" for row in rows]
        cells += [f"{slope:.2f}" for slope in slopes]
        cells += [f"{row['gib']:.2f}" for row in rows]
        print(f"| {name} | {' | '.join(cells)} |")
        if len(slopes) > 1 and slopes[-1] > most_ms(slopes[-2], [run["rows"] for run in runs]):
            missed.append(f"{name}: {slopes[-2]:.2f} ms a row, then {slopes[-1]:.2f}")
        if max(row["gib"] for row in rows) >= MOST_GIB:
            missed.append(f"{name}: {max(row['gib'] for row in rows):.2f} GiB")
    for run in runs:
        wall_s = run["stages"]["whole command"]["wall_s"]
        print(f"{run['rows']} photographs: {wall_s:.0f} s of wall time; slices {run['slices']}")
    return missed


def most_ms(before: float, sizes: Sequence[int]) -> float:
    """Milliseconds a row between the two largest sizes that are no growth over `before`."""
    first, second = (high - low for low, high in pairwise(sorted(sizes)[-3:]))
    starts = START_S * 1000 * (MOST_GROWTH / first + 1 / second)
    return MOST_GROWTH * max(before, SMALLEST_MS) + starts


def main() -> int:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 5_000, 50_000])
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="Last stage that runs.")
    parser.add_argument("--results", type=Path, help="JSON: sizes in it are not measured again.")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if options.results and options.results.is_file():
        runs = json.loads(options.results.read_text(encoding="utf-8"))
    for size in options.sizes:
        if size in (run["rows"] for run in runs):
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_size(Path(folder), size, options.until))
        if options.results:
            options.results.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    missed = report(sorted(runs, key=lambda run: run["rows"]))
    print("\n".join(["missed:", *missed]) if missed else "every stage within its target")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
