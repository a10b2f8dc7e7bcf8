"""SNR-HW objective with its gradient written out: the same numbers in fewer passes over memory.

The plain expression (`components.objectives.snr_huber`) keeps about twenty latent-sized tensors for
autograd. Here one function computes loss and gradient together, so the backward pass is a single
multiplication and one latent-sized tensor is kept. On a CPU large latents go through a compiled
loop, once and in place. With R = -t W e, e = v - v*, W the orthonormal Haar transform and
s = sqrt(1 + (R/c)^2):

    rho = R^2 / (1 + s),   d rho / d R = R / s,   d loss / d v = -t omega / N  W^T (weight R / s).

Shape legend: B batch, C channels, H height, W width of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from components.objectives.flow_matching import at_least_float32, clamp_time, expand_time
from components.objectives.haar import haar, require_even_size
from components.objectives.snr_huber import SnrHuberSettings, huber_threshold, time_weight

LOOP_FROM = 2**18
"""Coefficients, four times those of a 512 px picture under F16. Below, importing the compiler would
cost a short run more than its steps save."""

BandWeights: TypeAlias = tuple[float, float, float, float]
LossAndGradient: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, BandWeights], tuple[Tensor, Tensor]
]


def loss_and_gradient(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    threshold: Tensor,
    band_weights: BandWeights,
) -> tuple[Tensor, Tensor]:
    """Sum of weighted pseudo-Huber residuals per sample, and W^T of its slopes.

    Args:
        velocity: (B, C, H, W), at least float32.
        latents: (B, C, H, W).
        noise: (B, C, H, W).
        t: (B, 1, 1, 1), clamped.
        threshold: (B, 1, 1, 1), c(t).
        band_weights: of (ll, lh, hl, hh).

    Returns:
        (sum (B,), slopes (B, C, H, W)); times -t omega / N the slopes are the loss's gradient.
    """
    # In place where the tensor is this function's own: each new one costs page faults.
    # v - v* = v - (eps - z) = v - eps + z, and W is linear: -t is applied before the transform.
    residual = torch.sub(velocity, noise).add_(latents).mul_(-t)
    # One division a sample instead of one a coefficient.
    curvature = threshold.pow(-2)
    total, slopes = velocity.new_zeros(velocity.shape[0]), []
    for band, weight in zip(haar(residual), band_weights, strict=True):
        square = band.square()
        root = (square * curvature).add_(1.0).sqrt_()
        # The 1/2 is W^T's (`inverse_haar` divides by 2), taken in while the band is at hand.
        slopes.append((band / root).mul_(weight / 2))
        # `square` and `root` are overwritten: neither is needed after this line.
        total = total + weight * square.div_(root.add_(1.0)).flatten(1).sum(1)
    # W^T in two steps of four additions, then a, b, c, d of every block back to their places.
    ll, lh, hl, hh = slopes
    top_left, top_right, low_left, low_right = ll + hl, ll - hl, lh + hh, lh - hh
    rows = (
        torch.stack((top_left + low_left, top_right + low_right), dim=-1).flatten(-2),
        torch.stack((top_left - low_left, top_right - low_right), dim=-1).flatten(-2),
    )
    gradient = torch.stack(rows, dim=-2).flatten(-3, -2)
    return total, gradient


def cpu_loss_and_gradient(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    threshold: Tensor,
    band_weights: BandWeights,
) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient` of float32 on a CPU in one walk over memory, on torch's threads.

    Each plane is added up alone, so that sums do not depend on the number of threads.

    Raises:
        ValueError: odd latent size.
    """
    require_even_size(velocity)
    # Imports numba.
    from components.objectives.snr_huber_kernels import loss_and_slopes

    samples, channels, height, width = velocity.shape
    planes = samples * channels
    predicted, clean, drawn = [
        x.detach().contiguous().view(planes, height, width).numpy()
        for x in (velocity, latents, noise)
    ]
    minus_t, curvature = [
        x.flatten().repeat_interleave(channels).numpy() for x in (-t, threshold.pow(-2))
    ]
    weights = np.array(band_weights, np.float32)
    slopes = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    sums = np.empty(planes)
    filled = slopes.view(planes, height, width).numpy()
    threads = min(torch.get_num_threads(), planes)

    def some(part: int) -> None:
        chosen = slice(planes * part // threads, planes * (part + 1) // threads)
        loss_and_slopes(
            predicted[chosen],
            clean[chosen],
            drawn[chosen],
            minus_t[chosen],
            curvature[chosen],
            weights,
            np.empty((2, width), np.float32),
            sums[chosen],
            filled[chosen],
        )

    if threads == 1:
        some(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, range(threads)))
    return torch.from_numpy(sums).view(samples, channels).sum(1).float(), slopes


@cache
def _compiled() -> LossAndGradient:
    """A few kernels by torch.compile, made at first use: Triton on a GPU, C++ on a CPU."""
    return torch.compile(loss_and_gradient, dynamic=True)


class _SnrHuber(torch.autograd.Function):
    """Loss per sample; differentiable once, with respect to the velocity."""

    @staticmethod
    def forward(
        ctx: Any,
        velocity: Tensor,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        settings: SnrHuberSettings,
        kernel: LossAndGradient,
    ) -> Tensor:
        # Everything inside runs without autograd: `backward` is the only source of this gradient.
        clamped = clamp_time(t)
        wide = at_least_float32(velocity)
        if (
            kernel is loss_and_gradient
            # A trace without memory (`plan`) follows operators.
            and type(wide) is Tensor
            and wide.device.type == "cpu"
            and wide.dtype == torch.float32
            and wide.numel() >= LOOP_FROM
            and latents.shape == noise.shape == velocity.shape
        ):
            kernel = cpu_loss_and_gradient
        ctx.is_large_on_cpu = kernel is cpu_loss_and_gradient
        total, slopes = kernel(
            wide,
            at_least_float32(latents),
            at_least_float32(noise),
            expand_time(clamped, wide),
            expand_time(huber_threshold(clamped, settings), wide),
            settings.band_weights,
        )
        scale = time_weight(clamped, settings) / velocity[0].numel()
        # The one latent-sized tensor that is kept; everything else of the gradient is a factor
        # per sample.
        ctx.save_for_backward(slopes, -clamped * scale)
        # -t is the derivative of the residual in the velocity; the kernel leaves it to the sample
        # factor.
        ctx.dtype = velocity.dtype
        return scale * total

    # The slopes are constants to autograd: a second derivative would be wrong, so it is an error.
    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        slopes, scale = ctx.saved_tensors
        factor = expand_time(scale * gradient_B, slopes)
        # In place: a tensor as large as the latents less, and its page faults.
        gradient = slopes.mul_(factor) if ctx.is_large_on_cpu else slopes * factor
        return gradient.to(ctx.dtype), None, None, None, None, None


def fused_snr_huber_loss(
    velocity: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    settings: SnrHuberSettings,
    *,
    compiled: bool = False,
) -> Tensor:
    """`snr_huber_wavelet_loss` to rounding, at a fraction of its memory traffic.

    Gradients flow to the velocity only, and once (no double backward; after one backward pass the
    graph is used up).

    Args:
        velocity: (B, C, H, W) predicted velocity, any floating dtype, H and W even.
        latents: (B, C, H, W) clean latents.
        noise: (B, C, H, W) the noise that was mixed in.
        t: (B,) in [0, 1].
        settings: objective settings.
        compiled: generated by torch.compile (seconds at the first call); for GPUs.

    Returns:
        (B,) float32 (float64 for float64 velocities), mean over coefficients.

    Raises:
        ValueError: odd latent size, or t is not (B,).
    """
    # On a CPU the generated code is slower than both others (docs/decisions/models.md).
    kernel = _compiled() if compiled else loss_and_gradient
    loss: Tensor = _SnrHuber.apply(velocity, latents, noise, t, settings, kernel)  # type: ignore[no-untyped-call]
    return loss
