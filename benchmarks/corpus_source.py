"""A folder of many small photographs through `source` and `ingest`, then with one more.

    python benchmarks/corpus_source.py --files 50000

In a clone of the last commit, by the commands that a person types. Figures of a step: seconds of
wall and processor time, and the largest process in MiB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import small_project
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILES_PER_FOLDER = 10_000


def make_photographs(folder: Path, count: int) -> None:
    """Distinct files of about 12 kB: one photograph with a number behind its end."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.jpg", quality=85)
    data = (folder / "one.jpg").read_bytes()
    for number in range(1, count):
        inner = folder / f"{number // FILES_PER_FOLDER:03}"
        inner.mkdir(exist_ok=True)
        (inner / f"{number:07}.jpg").write_bytes(data + number.to_bytes(4, "big"))


def timed(project: Path, what: str, *words: str) -> None:
    """Run a command and print its row of the table."""
    env = os.environ | {"PYTHONPATH": str(project)}
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(words, cwd=project, env=env, stdout=said, stderr=said)
        # Of the command and all that it waited for.
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - started
        if status:
            said.seek(0)
            sys.exit(said.read().decode())
    cpu_s = used.ru_utime + used.ru_stime
    print(f"| {what} | {wall_s:.1f} | {cpu_s:.1f} | {used.ru_maxrss / 1024:.0f} |", flush=True)


def main() -> None:
    """Make the clone, run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=50_000)
    files = parser.parse_args().files
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
        small_project.change_settings(
            project, {"ingest.source": "photos", "ingest.attribution": None}
        )
        make_photographs(project / "photos", files)
        print(f"| {files} photographs | wall s | CPU s | peak MiB |\n|---|---|---|---|")
        timed(project, "`code`, for the start of commands", "dvc", "repro", "-s", "code")
        timed(project, "`source`, all new", "dvc", "repro", "-s", "source")
        timed(project, "`ingest`", "dvc", "repro", "-s", "ingest")
        timed(project, "both, nothing new", "dvc", "repro", "ingest")
        timed(project, "`ultraflux stage list`", "ultraflux", "stage", "list")
        data = (project / "photos" / "one.jpg").read_bytes()
        (project / "photos" / "another.jpg").write_bytes(data + b"another")
        timed(project, "`source`, one more", "dvc", "repro", "-s", "source")
        timed(project, "`ingest`, one more", "dvc", "repro", "-s", "ingest")


if __name__ == "__main__":
    main()
