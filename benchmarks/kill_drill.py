"""SIGKILL and SIGTERM at random moments of everything that trains or encodes; are the bytes equal?

    python benchmarks/kill_drill.py [--points 50] [--seed 0] [--kills-a-run 4]

Stages: decoder (`train_vae`), latents (`encode_corpus`), both stages of the transformer (`run_job`,
bf16, ZeRO 2; the second starts from the first one's average). Each runs once undisturbed; then
again and again in new processes, each disturbed at a moment drawn from that time, until it ends by
itself after `--kills-a-run` disturbances. Every second disturbance is a SIGTERM. Compared are all
bytes that a stage leaves as its result; for SIGTERM also the step that was logged last with the one
that was saved. Ends with an error when bytes differ or more than one step is lost.

Processes are forked from this one, which has imported everything, so the moments fall into work and
not into imports.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from synthetic_job import make_job, write_stores

from components.images.pixel_range import to_pixels
from components.models.tiny import build_tiny_autoencoder, synthetic_images
from components.settings.training import LatentsSettings, ReconstructionSettings, VaeSettings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.distributed.interruption import listening
from components.training.distributed.ranks import (
    deterministic_torch,
    open_ranks,
    training_environment,
)
from components.training.dit.job import DitJob
from components.training.dit.worker import run_job
from components.training.encoding.latents import encode_corpus, encoding_items
from components.training.vae.crops import Photograph, WorkingCopies
from components.training.vae.export import export_training
from components.training.vae.trainer import train_vae

STEPS = 24


@dataclass(frozen=True)
class Stage:
    """Something that a process does, and where it leaves what."""

    name: str
    work: Callable[[Path], None]
    result: Callable[[Path], Path]
    """Folder whose bytes count."""
    trains: bool


def photographs(folder: Path) -> list[Path]:
    """Twelve pictures with 1/f spectra."""
    folder.mkdir()
    paths = []
    for number, image in enumerate(to_pixels(synthetic_images(12, 256, 11))):
        paths.append(folder / f"{number:02d}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


def decoder(paths: list[Path], cache: Path, folder: Path) -> None:
    """`train_vae` and its export."""
    settings = VaeSettings(
        crop_px=128,
        batch_size=4,
        micro_batch_size=4,
        precision="fp32",
        gradient_checkpointing=False,
        steps=STEPS,
        learning_rate=2e-3,
        weight_decay=0.01,
        loss=ReconstructionSettings(
            wavelet=0.2,
            perceptual=0.1,
            l2=1.0,
            perceptual_kind="gmsd",
            lpips_backbone=None,
            lpips_sha256=None,
        ),
        eval_crops=3,
        eval_every=12,
        checkpoint_every=5,
    )
    taken = [Photograph(path.name, path) for path in paths]
    training, held_out = (WorkingCopies(part, 128, cache) for part in (taken[:8], taken[8:]))
    network = build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, seed=3)
    with deterministic_torch(1), open_ranks("cpu") as ranks, listening() as stop:
        done = train_vae(
            network,
            training,
            held_out,
            settings,
            ranks,
            seed=7,
            state_dir=folder / "state",
            metrics=MetricLog(folder / "metrics.jsonl"),
            stop=stop,
        )
        export_training(network, done, folder / "export", {})


def latents(paths: list[Path], folder: Path) -> None:
    """`encode_corpus` over the pictures."""
    rows = pd.DataFrame(
        {
            "image_id": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
            "split": "train",
            "uri": [path.name for path in paths],
            "bucket_height": 256,
            "bucket_width": 256,
        }
    )
    network = build_tiny_autoencoder(block_out_channels=(16, 16, 32, 32), norm_num_groups=4)
    with deterministic_torch(1):
        encode_corpus(
            encoding_items(rows, paths[0].parent),
            network,
            LatentsSettings(batch_size=1, dtype="float32", shard_mb=1),
            work_dir=folder / "encoding",
            destination=folder / "export",
        )


def transformer(stores: Path, name: str, initial: Path | None, folder: Path) -> None:
    """`run_job` of one stage."""
    job = make_job(
        stores,
        folder,
        heads=2,
        layers=1,
        stage={
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 5,
            "validate_every": 12,
            "initial_weights": "pretrained",
            "samples": {
                "every": None, "prompts": 1, "num_inference_steps": 1, "guidance_scale": 1.0
            },
        },
        runtime={"processes": 1, "torch_threads": 1, "device": "cpu"},
    )  # fmt: skip
    run_job(DitJob.model_validate(job.model_dump() | {"name": name, "initial_weights": initial}))


def stages(root: Path) -> list[Stage]:
    """The four, over data made here."""
    paths = photographs(root / "photographs")
    write_stores(root)
    first = root / "dit_stage1-undisturbed" / "export" / "ema"
    export = Path("export")
    return [
        Stage("vae", lambda f: decoder(paths, root / "cache", f), lambda f: f / export, True),
        Stage("latents", lambda f: latents(paths, f), lambda f: f / export, False),
        Stage(
            "dit_stage1",
            lambda f: transformer(root, "dit_stage1", None, f),
            lambda f: f / export,
            True,
        ),
        Stage(
            "dit_stage2",
            lambda f: transformer(root, "dit_stage2", first, f),
            lambda f: f / export,
            True,
        ),
    ]


def digest(folder: Path) -> str:
    """Of names and bytes of all files below."""
    summed = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            summed.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return summed.hexdigest()[:16]


def started(stage: Stage, folder: Path) -> int:
    """A process that does the stage's work; 0 is its exit code where it ended by itself."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        (folder / "state").mkdir(parents=True, exist_ok=True)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        stage.work(folder)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def waited(process: int, until: float) -> int | None:
    """The exit code, negative for a signal; None: still at work at the time `until`."""
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def ended(process: int) -> int:
    """The exit code, after at most ten minutes."""
    code = waited(process, time.monotonic() + 600)
    if code is None:
        os.kill(process, signal.SIGKILL)
        raise SystemExit("a process did not end")
    return code


def lost_steps(folder: Path) -> int:
    """Steps in the log beyond the newest checkpoint."""
    steps, _ = MetricLog(folder / "metrics.jsonl").series("loss")
    newest = newest_checkpoint(folder / "state" / "checkpoints")
    return max(steps, default=0) - (newest[0] if newest else 0)


def drill(stage: Stage, root: Path, points: int, a_run: int, draw: random.Random) -> bool:
    """Disturb one stage `points` times; whether all was as it should be."""
    begin = time.monotonic()
    if code := ended(started(stage, root / f"{stage.name}-undisturbed")):
        raise SystemExit(f"{stage.name}: undisturbed, it ended with {code}")
    lasts_s = time.monotonic() - begin
    expected = digest(stage.result(root / f"{stage.name}-undisturbed"))
    counts = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    saved, most_lost, runs, equal = 0, 0, 0, 0
    while sum(counts.values()) < points:
        folder = root / f"{stage.name}-{runs}"
        disturbed = 0
        while True:
            process = started(stage, folder)
            left = points - sum(counts.values())
            if disturbed == a_run or not left:
                code = ended(process)
                break
            ended_alone = waited(process, time.monotonic() + draw.uniform(0.02, 0.6) * lasts_s)
            if ended_alone is not None:
                code = ended_alone
                break
            number = list(counts)[sum(counts.values()) % 2]
            os.kill(process, number)
            code = ended(process)
            counts[number] += 1
            disturbed += 1
            if number == signal.SIGTERM and stage.trains and code == 130:
                saved += 1
                most_lost = max(most_lost, lost_steps(folder))
        runs += 1
        if code:
            print((folder / "log.txt").read_text()[-2000:], file=sys.stderr)
        equal += not code and digest(stage.result(folder)) == expected
    trained = f"{saved} saved, at most {most_lost} steps lost" if stage.trains else "-"
    print(
        f"| {stage.name} | {counts[signal.SIGKILL]} | {counts[signal.SIGTERM]} | {trained} | "
        f"{equal} of {runs} |",
        flush=True,
    )
    return equal == runs and most_lost <= 1


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=50, help="over all four stages")
    parser.add_argument("--kills-a-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(training_environment("cpu"), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401

    draw = random.Random(options.seed)
    print("| stage | SIGKILL | SIGTERM | of these | runs with the same bytes |")
    print("|---|---:|---:|---|---:|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        kinds = stages(root)
        each = [options.points // len(kinds)] * len(kinds)
        each[-1] += options.points - sum(each)
        good = [
            drill(stage, root, points, options.kills_a_run, draw)
            for stage, points in zip(kinds, each, strict=True)
        ]
    if not all(good):
        raise SystemExit("bytes differ, or more than one step was lost")


if __name__ == "__main__":
    main()
