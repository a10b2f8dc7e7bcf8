"""Cost of the training objectives: forward and backward, as a ratio to plain MSE.

    python benchmarks/objective_cost.py [--device cpu|cuda] [--rounds 15] [--batches 1 4]

Latents are those of a 4096 x 4096 image under the F16 autoencoder, (B, 16, 256, 256) float32. All
objectives take turns in one process and the fastest round of each counts; on the CPU the time is
the process's own, so that other work on the machine disturbs it little. "Plain MSE" is
`mse_loss(velocity, target)` with the target ready; flow matching makes its target inside.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from verdicts import Verdict, conclude

from components.objectives.flow_matching import flow_matching_loss, wavelet_flow_loss
from components.objectives.fused_snr_huber import fused_snr_huber_loss
from components.objectives.snr_huber import SnrHuberSettings, snr_huber_wavelet_loss

LATENT_CHW = (16, 256, 256)
WARM_UP = 2


def objectives(batch: int, device: str) -> tuple[Tensor, dict[str, Callable[[], Tensor]]]:
    """(velocity, scalar losses by name) on fixed random latents."""
    generator = torch.Generator().manual_seed(0)
    velocity, latents, noise = (
        torch.randn((batch, *LATENT_CHW), generator=generator).to(device) for _ in range(3)
    )
    velocity.requires_grad_(True)
    t = torch.linspace(0.2, 0.8, batch, device=device)
    target = noise - latents
    settings = SnrHuberSettings()
    compiled_plain = torch.compile(snr_huber_wavelet_loss, dynamic=True)
    inputs = (velocity, latents, noise)
    return velocity, {
        "plain MSE": lambda: torch.nn.functional.mse_loss(velocity, target),
        "flow matching": lambda: flow_matching_loss(*inputs).mean(),
        "WLF (x0)": lambda: wavelet_flow_loss(*inputs, t).mean(),
        "SNR-HW": lambda: snr_huber_wavelet_loss(*inputs, t, settings).mean(),
        "SNR-HW fused": lambda: fused_snr_huber_loss(*inputs, t, settings).mean(),
        "SNR-HW, torch.compile": lambda: compiled_plain(*inputs, t, settings).mean(),
        "SNR-HW fused, torch.compile": lambda: fused_snr_huber_loss(
            *inputs, t, settings, compiled=True
        ).mean(),
    }


def step_seconds(loss: Callable[[], Tensor], velocity: Tensor, device: str) -> float:
    """Time of one forward and backward pass: wall on the GPU, CPU seconds (all threads) else."""
    if device == "cpu":
        started = time.process_time()
        torch.autograd.grad(loss(), velocity)
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.autograd.grad(loss(), velocity)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    """Print one table; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{device} ({name or platform.machine()}), {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, fastest of {options.rounds} rounds in alternation\n")
    print(f"{'latents':<20}{'objective':<30}{'ms':>9}{'x plain MSE':>13}")
    verdicts = []
    for batch in options.batches:
        velocity, losses = objectives(batch, device)
        best = dict.fromkeys(losses, float("inf"))
        fused = []
        for turn in range(WARM_UP + options.rounds):
            took: dict[str, float] = {}
            for label, loss in losses.items():
                seconds = step_seconds(loss, velocity, device)
                took[label] = seconds
                if turn >= WARM_UP:
                    best[label] = min(best[label], seconds)
            if turn >= WARM_UP:
                fused.append(took["SNR-HW fused"] / took["plain MSE"])
        shape = "x".join(str(n) for n in (batch, *LATENT_CHW))
        for label, seconds in best.items():
            ratio = seconds / best["plain MSE"]
            print(f"{shape:<20}{label:<30}{seconds * 1e3:>9.2f}{ratio:>13.2f}")
        threads = torch.get_num_threads() if device == "cpu" else 0
        name = f"SNR-HW fused / plain MSE, {shape}, {device}" + (f" {threads}" if threads else "")
        verdicts.append(Verdict(name, tuple(fused), 2.5))
    return conclude(verdicts)


if __name__ == "__main__":
    sys.exit(main())
