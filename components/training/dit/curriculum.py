"""Noise levels and noise of training: Stage-wise Aesthetic Curriculum Learning's sampling side.

SACL (UltraFlux section 3.2.4) trains stage 2 on high noise levels only. A base density over
t in [0, 1] (0 data, 1 noise) is restricted to `sigma_range` by its inverse CDF: clamping would
pile up mass at the ends. Everything is drawn from a generator keyed by (seed, step, sample id),
so neither the number of processes nor the micro batch size changes a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

TimestepDensity: TypeAlias = Literal["uniform", "logit_normal", "shifted"]

# The released sampling script's FlowMatchEuler shift; `shifted` trains on the same levels.
SHIFT = 3.0


def density_cdf(t: Tensor, density: TimestepDensity) -> Tensor:
    """Cumulative distribution of the base density.

    Args:
        t: any shape, values in [0, 1].
        density: `uniform`: t; `logit_normal`: Phi(logit t), location 0 and scale 1 (Esser et al.
            2024, equation 19); `shifted`: the law of s u / (1 + (s - 1) u) for uniform u, s = 3.

    Returns:
        float64 in [0, 1].
    """
    t = t.double()
    if density == "uniform":
        return t
    if density == "logit_normal":
        share: Tensor = torch.special.ndtr(torch.logit(t))
        return share
    if density == "shifted":
        return t / (SHIFT - (SHIFT - 1.0) * t)
    raise ValueError(f"timestep_density {density!r}: expected uniform, logit_normal or shifted")


def density_quantile(probability: Tensor, density: TimestepDensity) -> Tensor:
    """Inverse of `density_cdf`: probability in [0, 1] to t in [0, 1], float64."""
    # float64 because the tails are what float32 loses: 1 - p near 1 has few bits left.
    p = probability.double()
    if density == "uniform":
        return p
    if density == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(p))
    if density == "shifted":
        return SHIFT * p / (1.0 + (SHIFT - 1.0) * p)
    raise ValueError(f"timestep_density {density!r}: expected uniform, logit_normal or shifted")


def restricted_time(
    uniform: Tensor, density: TimestepDensity, sigma_range: tuple[float, float]
) -> Tensor:
    """Noise level of the base density conditioned on `sigma_range`.

    t = F^-1(F(low) + u (F(high) - F(low))).

    Args:
        uniform: u in [0, 1), any shape.
        density: base density.
        sigma_range: (low, high), 0 <= low < high <= 1.

    Returns:
        Same shape, float64 in [low, high].

    Raises:
        ValueError: the range is not increasing inside [0, 1].
    """
    low, high = sigma_range
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"sigma_range [{low}, {high}] must be increasing inside [0, 1]")
    # Only the two ends go through the CDF; draws go through its inverse, so none is ever rejected
    # and each costs exactly one uniform number.
    bounds = density_cdf(torch.tensor([low, high], dtype=torch.float64), density)
    probability = bounds[0] + uniform.double() * (bounds[1] - bounds[0])
    # The clamp only takes back rounding of the last digit at the two ends.
    return density_quantile(probability, density).clamp(low, high)


def keyed_generator(seed: int, step: int, sample_id: str, occurrence: int = 0) -> torch.Generator:
    """CPU generator of one training example.

    Args:
        seed: root seed.
        step: optimizer step, or a negative number that names another purpose.
        sample_id: which sample.
        occurrence: tells repeats of a sample in one batch apart.
    """
    key = f"{seed}/{step}/{occurrence}/{sample_id}".encode()
    # A hash, since sums of seed and step collide; not Python's own, which differs between
    # processes. Signed, because `manual_seed` takes 64 signed bits.
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
    # On the CPU wherever the model trains: the same draws on every device.
    return torch.Generator("cpu").manual_seed(number)


def draw_noise(
    seed: int,
    step: int,
    sample_ids: Sequence[str],
    occurrences: Sequence[int],
    latent_shape: tuple[int, int, int],
    density: TimestepDensity,
    sigma_range: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Noise and noise levels of a (part of a) batch.

    Args:
        seed: root seed.
        step: optimizer step.
        sample_ids: B ids.
        occurrences: B repeat counters (`GlobalBatch.occurrences`).
        latent_shape: (channels, height, width) in latent pixels.
        density: base density of t.
        sigma_range: levels that may occur.

    Returns:
        (noise (B, C, H, W) standard normal float32, t (B,) float32 in `sigma_range`), on the CPU.
    """
    noises, uniforms = [], []
    for sample_id, occurrence in zip(sample_ids, occurrences, strict=True):
        generator = keyed_generator(seed, step, sample_id, occurrence)
        # The level first, so that it does not depend on the size of the latent. float64, because
        # quantiles are steep at both ends of the range.
        uniforms.append(torch.rand((), generator=generator, dtype=torch.float64))
        noises.append(torch.randn(latent_shape, generator=generator, dtype=torch.float32))
    t = restricted_time(torch.stack(uniforms), density, sigma_range)
    return torch.stack(noises), t.float()
