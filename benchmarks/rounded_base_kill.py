"""SIGKILL of `ultraflux stage run dit_stage1` while it trains on a rounded base; equal bytes?

    python benchmarks/rounded_base_kill.py CLONE [--kind int8] [--kills 1] [--seed 0]

In a clone with the embedded profile. Writes weights/FLUX.1-dev (random, small, stock diffusers'
classes) and what an adapter on it takes into params.yaml, makes what the stage reads, trains once
undisturbed, then again with the command killed at random steps, and compares every file of
data/dit_stage1. Ends with 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import small_project
import tiny_card
import yaml
from process_tree import command_environment

from components.telemetry.metric_log import MetricLog

STAGE, BASE = "dit_stage1", "weights/FLUX.1-dev"
SETTINGS = {
    "models.transformer.pretrained": f"{BASE}/transformer",
    "models.autoencoder.pretrained": f"{BASE}/vae",
    "models.text_encoders.pretrained": BASE,
    "dit_stage1.adapter": {"rank": 4, "alpha": 4, "target_modules": ["to_q", "to_k", "proj_out"]},
    "dit_stage1.steps": 30,
    "dit_stage1.validate_every": 10,
    "dit_stage1.checkpoint_every": 3,
    "dit_stage1.validation_training_images": 2,
}


def prepare(clone: Path, kind: str) -> None:
    """Write the base and the settings."""
    small_project.change_settings(clone, SETTINGS)
    path = clone / "params.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["models"]["transformer"]["quantisation"] = kind
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    tiny_card.write_tiny_flux(clone / BASE)


def make_inputs(clone: Path) -> None:
    """Run the stages before."""
    for name in ("latents", "text_embeddings"):
        command = ["ultraflux", "run", "--engine", "local", "--until", name]
        subprocess.run(command, cwd=clone, env=environment(clone), check=True)


def environment(clone: Path) -> dict[str, str]:
    """The clone's own code, by the command beside this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return command_environment(clone) | {"PATH": path}


def forget(clone: Path) -> None:
    """Remove the stage's result and its state."""
    for folder in ("data", "runs"):
        shutil.rmtree(clone / folder / STAGE, ignore_errors=True)


def hashes(clone: Path) -> dict[str, str]:
    """sha256 of every file of the result."""
    folder = clone / "data" / STAGE
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def steps_done(clone: Path) -> int:
    """Newest step in the log of the run."""
    logs = list((clone / "runs" / STAGE).glob("*/metrics.jsonl"))
    return max((int(row["step"]) for log in logs for row in MetricLog(log).rows()), default=0)


def start(clone: Path) -> subprocess.Popen[str]:
    """The command, in a group of its own."""
    return subprocess.Popen(
        ["ultraflux", "stage", "run", STAGE],
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(clone: Path) -> dict[str, str]:
    """Run to the end; hashes of the result."""
    process = start(clone)
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode}: {said}")
    return hashes(clone)


def kill_after(clone: Path, step: int) -> int:
    """Start, and SIGKILL once a step is logged; the newest step then."""
    process = start(clone)
    while process.poll() is None and steps_done(clone) < step:
        time.sleep(0.02)
    if process.poll() is not None:
        sys.exit("error: the command ended before it could be killed")
    done = steps_done(clone)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--kind", default="int8", choices=("int8", "nf4", "fp8"))
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    clone, draw = given.clone.resolve(), random.Random(given.seed)
    prepare(clone, given.kind)
    make_inputs(clone)
    forget(clone)
    quiet = finish(clone)
    forget(clone)
    for _ in range(given.kills):
        print(f"killed at step {kill_after(clone, steps_done(clone) + draw.randint(4, 9))}")
    found = finish(clone)
    differ = [name for name in quiet if found.get(name) != quiet[name]]
    print(f"{given.kind}: {len(quiet) - len(differ)} of {len(quiet)} files equal {differ or ''}")
    sys.exit(bool(differ) or quiet.keys() != found.keys())


if __name__ == "__main__":
    main()
