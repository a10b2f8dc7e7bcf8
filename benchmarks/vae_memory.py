"""Peak memory and time of encoding and decoding one image with the Flux-shaped F16 autoencoder.

    python benchmarks/vae_memory.py [--size 4096x4096] [--dtype bfloat16] [--tile 1024]

Random weights in Flux's true shape (128, 256, 512, 512 channels, 16 latent channels): memory and
time do not depend on their values. Each mode runs in a process of its own; its peak is the growth
over what the process held with the model loaded (CPU: resident set, CUDA: allocated bytes).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

MODES = ("encode", "decode", "encode tiled", "decode tiled")
FLUX_SHAPE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
}


def peak_resident() -> int:
    """Highest resident set of this process since the mark was last cleared, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def run_mode(mode: str, size: tuple[int, int], dtype_name: str, tile: int, device: str) -> None:
    """Measure one mode in this process and print a JSON line."""
    import torch

    from components.models.autoencoder_f16 import AutoencoderKLF16

    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    height, width = size
    model = AutoencoderKLF16(**FLUX_SHAPE).eval().requires_grad_(False)
    model = model.to(device=device, dtype=dtype)
    if mode.endswith("tiled"):
        model.enable_tiling()
        model.set_tile_size(tile)
    shape = (1, 3, height, width)
    if mode.startswith("decode"):
        factor = model.spatial_compression
        shape = (1, 16, height // factor, width // factor)
    values = torch.randn(shape, dtype=dtype, device=device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    with torch.inference_mode():
        if mode.startswith("decode"):
            model.decode(values)
        else:
            model.encode(values)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    print(json.dumps({"seconds": seconds, "peak": peak - before, "held": before}))


def main() -> None:
    """Measure every mode, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="4096x4096", help="width x height in pixels")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tile", type=int, default=1024, help="tile side in pixels")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    width, height = (int(edge) for edge in options.size.split("x"))
    if options.one:
        run_mode(options.one, (height, width), options.dtype, options.tile, options.device)
        return
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {options.device}, "
        f"{width}x{height}, {options.dtype}, tiles of {options.tile} px"
    )
    print(f"{'mode':14} {'peak GiB':>9} {'seconds':>9}")
    root = Path(__file__).resolve().parents[1]
    for mode in options.modes:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", mode],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{mode:14} ended with code {done.returncode} (out of memory?)")
            continue
        values = json.loads(done.stdout.splitlines()[-1])
        print(f"{mode:14} {values['peak'] / 2**30:9.2f} {values['seconds']:9.1f}", flush=True)


if __name__ == "__main__":
    main()
