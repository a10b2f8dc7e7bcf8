"""Validation of the DiT: held-out latents, fixed noise, eight fixed noise levels.

The headline number is the plain velocity error (flow matching loss) averaged over levels, images
and noise draws: it means the same whatever objective trains, so runs can be compared. The
objective's own value stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from components.objectives.flow_matching import flow_matching_loss
from components.objectives.objective import objective_loss
from components.settings.objective import ObjectiveSettings
from components.training.distributed.ranks import Ranks
from components.training.dit.curriculum import keyed_generator
from components.training.dit.velocity import NoisedBatch, predict_velocity
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

# Also the number of noise bands in the training log, so that both can be laid side by side.
LEVELS = 8
# Midpoints of eight equal parts of (0, 1): the mean over them is the midpoint rule for the
# integral over t.
NOISE_LEVELS = tuple((k + 0.5) / LEVELS for k in range(LEVELS))

HeldOut = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]
"""Image id, latents (c, h, w), text (tokens, width) and pooled text (width)."""


def band_losses(t: torch.Tensor, losses: torch.Tensor) -> dict[str, float]:
    """Mean training loss in each of eight equal noise bands that occur in the batch."""
    # t = 1 belongs to the last band, not to a ninth.
    bands = (t * LEVELS).long().clamp(0, LEVELS - 1)
    return {
        f"loss_band_{band}": float(losses[bands == band].double().mean())
        for band in sorted(set(bands.tolist()))
    }


@dataclass(frozen=True)
class ValidationLoss:
    """Losses by noise level, each a mean over images and noise draws."""

    velocity: tuple[float, ...]
    """Velocity error ||v - (eps - z)||^2 / N at each of `NOISE_LEVELS`."""
    objective: tuple[float, ...]
    """The training objective at each level."""

    @property
    def mean(self) -> float:
        """Mean velocity error over the levels: the validation loss."""
        return float(np.mean(self.velocity))

    def mean_within(self, sigma_range: tuple[float, float]) -> float:
        """Mean velocity error over the levels inside `sigma_range` (NaN when there is none)."""
        low, high = sigma_range
        # A stage that trains on part of the range is judged on that part.
        inside = [
            loss
            for level, loss in zip(NOISE_LEVELS, self.velocity, strict=True)
            if low <= level <= high
        ]
        return float(np.mean(inside)) if inside else float("nan")

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """Names and values for the metric log; `suffix` such as "_ema" names the weights."""
        values = {
            f"validation_loss{suffix}": self.mean,
            f"validation_objective{suffix}": float(np.mean(self.objective)),
        }
        for level, (velocity, objective) in enumerate(
            zip(self.velocity, self.objective, strict=True)
        ):
            values[f"validation_loss{suffix}_level_{level}"] = velocity
            values[f"validation_objective{suffix}_level_{level}"] = objective
        return values

    @classmethod
    def from_metrics(cls, row: Mapping[str, float], suffix: str = "") -> ValidationLoss:
        """Inverse of `metrics`."""
        return cls(
            tuple(row[f"validation_loss{suffix}_level_{k}"] for k in range(LEVELS)),
            tuple(row[f"validation_objective{suffix}_level_{k}"] for k in range(LEVELS)),
        )


class ValidationSet:
    """Held-out images with their noise."""

    def __init__(
        self,
        latents: LatentStore,
        texts: TextStore,
        image_ids: Sequence[str],
        *,
        repeats: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Fix the set.

        Args:
            latents: latent store.
            texts: text embeddings.
            image_ids: held-out images, at least one.
            repeats: noise draws per image and level.
            batch_size: samples per forward pass.
            seed: of the noise; equal seeds give equal validation losses.

        Raises:
            ValueError: no image.
        """
        if not image_ids:
            raise ValueError("validation: there is no held-out image (split 'eval')")
        self._latents, self._texts = latents, texts
        # Sorted, so that images fall to ranks in the same way whatever order the index has.
        self.image_ids = sorted(image_ids)
        self._repeats, self._batch_size, self._seed = repeats, batch_size, seed

    def _draws(self) -> list[tuple[int, int]]:
        return [(level, repeat) for level in range(LEVELS) for repeat in range(self._repeats)]

    def _batch(self, image: HeldOut, draws: Sequence[tuple[int, int]]) -> NoisedBatch:
        image_id, latents, text, pooled = image
        # A repeat is the generator's last key: more repeats keep the draws that were there.
        noise = [
            # Steps of training are not negative, so -1 - level is a stream of its own.
            torch.randn(
                latents.shape, generator=keyed_generator(self._seed, -1 - level, image_id, repeat)
            )
            for level, repeat in draws
        ]
        # One image at a time, because images of different buckets do not stack; its draws do.
        count = len(draws)
        return NoisedBatch(
            sample_ids=(image_id,) * count,
            latents=latents.expand(count, *latents.shape),
            noise=torch.stack(noise),
            t=torch.tensor([NOISE_LEVELS[level] for level, _ in draws], dtype=torch.float32),
            text=text.expand(count, *text.shape),
            pooled=pooled.expand(count, *pooled.shape),
        )

    @torch.no_grad()
    def evaluate(
        self,
        transformer: nn.Module,
        objective: ObjectiveSettings,
        guidance_scale: float,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> ValidationLoss:
        """Losses of `transformer`; images are divided over the ranks, every rank gets the result.

        Args:
            transformer: bare model (not an engine), same weights on all ranks.
            objective: the training objective.
            guidance_scale: as in training.
            dtype: of the transformer's weights.
            ranks: this process.
        """
        mine: dict[tuple[int, str, int], tuple[float, float]] = {}
        draws = self._draws()
        count = len(self.image_ids)
        # Every rank makes the same number of turns, and so the same number of forward passes.
        for first in range(0, count, ranks.data_world_size):
            # In the last round a rank without an image repeats one: with ZeRO 3 every forward
            # pass is collective.
            image_id = self.image_ids[(first + ranks.data_rank) % count]
            # Read anew at every validation: a held-out set of 4096 px latents in memory would cost
            # training its room.
            image = (image_id, self._latents.read(image_id), *self._texts.read(image_id))
            for start in range(0, len(draws), self._batch_size):
                # No larger than a training batch, for which the memory is known to suffice.
                part = draws[start : start + self._batch_size]
                batch = self._batch(image, part).to(ranks.device)
                velocity = predict_velocity(transformer, batch, guidance_scale, dtype)
                plain = flow_matching_loss(velocity, batch.latents, batch.noise).tolist()
                own = objective_loss(
                    objective, velocity, batch.latents, batch.noise, batch.t
                ).tolist()
                for (level, repeat), a, b in zip(part, plain, own, strict=True):
                    # Keyed, so that the image which a rank repeated counts once.
                    mine[level, image_id, repeat] = (a, b)
                # A validation of a large network takes longer than a rank may stand still.
                ranks.beat()
        everyone = {key: value for part in ranks.gather(mine) for key, value in part.items()}
        return _by_level(everyone)


def _by_level(losses: Mapping[tuple[int, str, int], tuple[float, float]]) -> ValidationLoss:
    """Average in float64 and in key order, so that the division over ranks leaves no trace."""
    means = []
    for level in range(LEVELS):
        values = [losses[key] for key in sorted(losses) if key[0] == level]
        means.append(np.asarray(values, dtype=np.float64).mean(axis=0))
    return ValidationLoss(tuple(float(m[0]) for m in means), tuple(float(m[1]) for m in means))
