"""The Prefect server killed at random moments under a pipeline: does the work end, who waits?

    python benchmarks/server_kills.py [--points 20] [--stages 3] [--seed 0]

A clone whose stages copy one small file runs `ultraflux run --engine prefect --force` undisturbed
three times, then again and again with a SIGKILL of the server (and all that it started) at a moment
drawn from the time between the server's start and the run's end, until so many have met a server
that was there. Per run: when it said that it goes on without the server, the longest pause between
two lines of its output after the kill, and how long the run lasted. Ends with an error when a run
does not end well, or when its longest pause is more than 10 s longer than the longest of an
undisturbed one whose first stage has ended (a busy machine has pauses of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from process_tree import command_environment
from trivial_clone import trivial_clone

ALLOWED_S = 10.0
COMMAND = ("ultraflux", "run", "--engine", "prefect", "--force", "--no-rehearsal")


@dataclass
class Run:
    """One run as it was seen from outside; times in seconds since its start."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    server_s: float | None = None
    killed_s: float | None = None
    ended_s: float = 0.0
    code: int = 0

    @property
    def noticed_s(self) -> float | None:
        """From the kill to the line that says so."""
        said = [at for at, line in self.lines if "goes on without it" in line]
        return said[0] - self.killed_s if said and self.killed_s is not None else None

    @property
    def longest_pause_s(self) -> float:
        """Between two lines, or the last line and the end, since the kill (else a first stage)."""
        begin = self.killed_s
        if begin is None:
            begin = min((at for at, _ in self.lines if at > (self.server_s or 0.0)), default=0.0)
        times = [begin, *(at for at, _ in self.lines if at > begin), self.ended_s]
        return max(after - before for before, after in itertools.pairwise(times))


def server_below(process: psutil.Process) -> psutil.Process | None:
    """The Prefect server that a run has started."""
    for child in process.children(recursive=True):
        try:
            if "prefect server start" in " ".join(child.cmdline()):
                return child
        except psutil.Error:
            continue
    return None


def kill(server: psutil.Process) -> bool:
    """SIGKILL to a process and all below it; False: it had ended before."""
    try:
        below = server.children(recursive=True)
        server.kill()
    except psutil.NoSuchProcess:
        return False
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return True


def run(clone: Path, env: dict[str, str], kill_after_s: float | None) -> Run:
    """One run, its server killed so long after the server's start (None: left alone)."""
    seen, began = Run(), time.monotonic()
    process = subprocess.Popen(
        COMMAND, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            seen.lines.append((time.monotonic() - began, line.rstrip()))

    reader = threading.Thread(target=read)
    reader.start()
    watched, server = psutil.Process(process.pid), None
    while process.poll() is None:
        now = time.monotonic() - began
        if server is None and (server := server_below(watched)) is not None:
            seen.server_s = now
        due = seen.server_s is not None and kill_after_s is not None
        if due and seen.killed_s is None and now >= seen.server_s + kill_after_s:  # type: ignore[operator]
            if not kill(server):  # type: ignore[arg-type]
                kill_after_s = None
                continue
            seen.killed_s = time.monotonic() - began
        time.sleep(0.02)
    reader.join()
    seen.ended_s, seen.code = time.monotonic() - began, process.returncode
    return seen


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        clone = trivial_clone(Path(temporary), options.stages)
        env = command_environment(clone) | {"PYTHONUNBUFFERED": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            env.pop(name, None)
        quiet = [run(clone, env, None) for _ in range(3)]
        if any(one.code for one in quiet):
            sys.exit(f"undisturbed: {quiet[0].lines[-3:]}")
        pause_s = max(one.longest_pause_s for one in quiet)
        lasts_s = sorted(one.ended_s - (one.server_s or 0.0) for one in quiet)[1]
        shown = ", ".join(f"{one.ended_s:.1f}" for one in quiet)
        print(
            f"undisturbed: {shown} s, longest pause {pause_s:.1f} s; load {os.getloadavg()[0]:.1f}"
        )
        print("| killed after the server's start | said after | longest pause then | run | exit |")
        print("|---:|---:|---:|---:|---:|", flush=True)
        met = 0
        while met < options.points:
            one = run(clone, env, draw.uniform(0.0, lasts_s))
            met += one.killed_s is not None
            noticed = "-" if one.noticed_s is None else f"{one.noticed_s:.1f} s"
            at = "not" if one.killed_s is None else f"{one.killed_s - (one.server_s or 0.0):.1f} s"
            print(
                f"| {at} | {noticed} | {one.longest_pause_s:.1f} s | {one.ended_s:.1f} s | "
                f"{one.code} |",
                flush=True,
            )
            if one.code:
                problems.append(f"point {met}: exit {one.code}: {one.lines[-1:]}")
                print(problems[-1], file=sys.stderr, flush=True)
            elif one.longest_pause_s > pause_s + ALLOWED_S:
                problems.append(f"point {met}: a pause of {one.longest_pause_s:.1f} s")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
