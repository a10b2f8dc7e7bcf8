"""Noise levels and noise of training: Stage-wise Aesthetic Curriculum Learning's sampling side.

SACL (UltraFlux section 3.2.4) trains stage 2 on high noise levels only. A base density over
t in [0, 1] (0 data, 1 noise), shifted as sampling shifts its levels where that is wished, is
restricted to `sigma_range` by its inverse CDF: clamping would pile up mass at the ends. Everything
is drawn from a generator keyed by (seed, step, sample id), so neither the number of processes nor
the micro batch size changes a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from components.models.noise_shift import (
    STATIC_SHIFT,
    dynamic_shift,
    shift_level,
    unshift_level,
)
from components.settings.training import DitStageSettings

if TYPE_CHECKING:
    import pandas as pd

TimestepDensity: TypeAlias = Literal["uniform", "logit_normal", "shifted"]


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
        return unshift_level(t, STATIC_SHIFT)
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
        return shift_level(p, STATIC_SHIFT)
    raise ValueError(f"timestep_density {density!r}: expected uniform, logit_normal or shifted")


@dataclass(frozen=True)
class NoiseLevels:
    """Which noise levels a stage trains on."""

    density: TimestepDensity = "uniform"
    """Of the levels before the shift."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    shift: float | Literal["dynamic"] = 1.0
    """s of `shift_level`; dynamic: by the tokens of the image."""
    table: Literal["unshifted", "shifted"] = "unshifted"
    """What `sigma_range` counts in: levels as they are, or entries of a table that is shifted."""

    @classmethod
    def of(cls, settings: DitStageSettings) -> NoiseLevels:
        """Those of a stage."""
        return cls(
            settings.timestep_density,
            settings.sigma_range,
            settings.timestep_shift,
            settings.sigma_table,
        )

    def shift_at(self, tokens: int) -> float:
        """S for images of so many tokens."""
        return dynamic_shift(tokens) if self.shift == "dynamic" else self.shift

    def range_at(self, tokens: int) -> tuple[float, float]:
        """(lowest, highest) level of images of so many tokens."""
        if self.table == "unshifted":
            return self.sigma_range
        # The density `shifted` is shifted by itself.
        shift = STATIC_SHIFT if self.density == "shifted" else self.shift_at(tokens)
        low, high = (shift_level(one, shift) for one in self.sigma_range)
        return low, high

    def span(self, tokens: Iterable[int]) -> tuple[float, float]:
        """(lowest, highest) level over images of several sizes, at least one."""
        ranges = [self.range_at(count) for count in set(tokens)]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def draw(self, uniform: Tensor, tokens: int) -> Tensor:
        """Levels for uniform numbers: the shifted density conditioned on the range.

        t = F^-1(F(low) + u (F(high) - F(low))), F the distribution of the shifted base density.

        Args:
            uniform: u in [0, 1), any shape.
            tokens: of the image.

        Returns:
            Same shape, float64 in the range.

        Raises:
            ValueError: the range is not increasing inside [0, 1].
        """
        low, high = self.range_at(tokens)
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"sigma_range [{low}, {high}] must be increasing inside [0, 1]")
        shift = self.shift_at(tokens)
        # Only the two ends go through the CDF; draws go through its inverse, so none is ever
        # rejected and each costs exactly one uniform number.
        ends = unshift_level(torch.tensor([low, high], dtype=torch.float64), shift)
        bounds = density_cdf(ends, self.density)
        probability = bounds[0] + uniform.double() * (bounds[1] - bounds[0])
        levels = shift_level(density_quantile(probability, self.density), shift)
        # The clamp only takes back rounding of the last digit at the two ends.
        return levels.clamp(low, high)


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


def dropped_captions(
    seed: int, step: int, sample_ids: Sequence[str], occurrences: Sequence[int], rate: float
) -> list[bool]:
    """Which samples of a batch are trained on with the empty prompt.

    Args:
        seed: root seed.
        step: optimizer step.
        sample_ids: B ids.
        occurrences: B repeat counters.
        rate: probability for each sample, 0 to 1.
    """
    # A stream of its own: noise and levels stay what they are at every rate. And the same number
    # is compared with every rate, so that a higher one drops the captions of a lower one, too.
    keys = (
        f"caption/{seed}/{step}/{occurrence}/{sample_id}"
        for sample_id, occurrence in zip(sample_ids, occurrences, strict=True)
    )
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return [int.from_bytes(digest, "little") < rate * 2**64 for digest in digests]


def trained_span(settings: DitStageSettings, index: pd.DataFrame) -> tuple[float, float]:
    """(lowest, highest) level that a stage trains on, over all sizes of a latent store's index."""
    sizes = zip(index["latent_h"], index["latent_w"], strict=True)
    return NoiseLevels.of(settings).span(image_tokens(int(h), int(w)) for h, w in sizes)


def image_tokens(latent_h: int, latent_w: int) -> int:
    """Tokens of latents: each is a 2x2 block, whichever backbone takes them."""
    return latent_h // 2 * (latent_w // 2)


def draw_noise(
    seed: int,
    step: int,
    sample_ids: Sequence[str],
    occurrences: Sequence[int],
    latent_shape: tuple[int, int, int],
    levels: NoiseLevels,
) -> tuple[Tensor, Tensor]:
    """Noise and noise levels of a (part of a) batch.

    Args:
        seed: root seed.
        step: optimizer step.
        sample_ids: B ids.
        occurrences: B repeat counters (`GlobalBatch.occurrences`).
        latent_shape: (channels, height, width) in latent pixels.
        levels: that may occur.

    Returns:
        (noise (B, C, H, W) standard normal float32, t (B,) float32 within `levels`), on the CPU.
    """
    noises, uniforms = [], []
    for sample_id, occurrence in zip(sample_ids, occurrences, strict=True):
        generator = keyed_generator(seed, step, sample_id, occurrence)
        # The level first, so that it does not depend on the size of the latent. float64, because
        # quantiles are steep at both ends of the range.
        uniforms.append(torch.rand((), generator=generator, dtype=torch.float64))
        noises.append(torch.randn(latent_shape, generator=generator, dtype=torch.float32))
    t = levels.draw(torch.stack(uniforms), image_tokens(*latent_shape[1:]))
    return torch.stack(noises), t.float()
