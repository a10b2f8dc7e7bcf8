"""Peak memory and time of pair metrics at 4096 x 4096; a process per metric.

    python benchmarks/evaluation_memory.py [--edge 4096] [--metrics ssim,ms_ssim,lpips_alex]

Two random images. LPIPS has random weights in the real architecture. The peak is the process's
resident set with interpreter, libraries and both images (2 x 48 MiB at 4096); the second column has
it without what was resident before the metric ran.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

METRICS = ("ssim", "ms_ssim", "lpips_alex")


def measure(metric: str, edge: int) -> None:
    """Run one metric in this process and print a line."""
    import numpy as np

    generator = np.random.default_rng(0)
    reference = generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    image = generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    if metric in {"ssim", "ms_ssim"}:
        from components.metrics.native import fidelity

        compute = getattr(fidelity, metric)
    else:
        import torch

        from components.metrics.networks.lpips import Lpips

        torch.manual_seed(0)
        compute = Lpips("vgg" if metric == "lpips" else "alex")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    value = compute(reference, image)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{metric} at {edge}x{edge}: peak {peak / 2**20:.2f} GiB, of which the metric "
        f"{(peak - before) / 2**20:.2f} GiB; {wall:.1f} s wall, {cpu:.1f} s CPU; value {value:.6f}"
    )


def main() -> None:
    """Start a process per metric."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=4096)
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--here", help="measure this one in this process")
    options = parser.parse_args()
    if options.here:
        measure(options.here, options.edge)
        return
    for metric in options.metrics.split(","):
        subprocess.run(
            [sys.executable, __file__, "--here", metric, "--edge", str(options.edge)], check=True
        )


if __name__ == "__main__":
    main()
