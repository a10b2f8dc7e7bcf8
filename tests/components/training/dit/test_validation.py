from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from components.models.latent_tokens import pack_latents
from components.settings.objective import ObjectiveSettings, SnrHuberSettings
from components.training.distributed.ranks import Ranks
from components.training.dit.validation import NOISE_LEVELS, ValidationLoss, ValidationSet
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import TextStore

OBJECTIVE = ObjectiveSettings(kind="flow_matching", wavelet_space="v", snr_huber=SnrHuberSettings())
ALONE = Ranks(0, 1, torch.device("cpu"))


class ConstantVelocity(nn.Module):
    """Predicts the same velocity everywhere."""

    class config:
        guidance_embeds = False

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden_states, **_):
        return (torch.full_like(hidden_states, self.value),)


def evaluate(root, model, *, ranks=ALONE, seed=1, batch_size=3, repeats=2):
    chosen = ValidationSet(
        LatentStore(root / "latents"),
        TextStore(root / "texts"),
        ["image00", "image01"],
        repeats=repeats,
        batch_size=batch_size,
        seed=seed,
    )
    return chosen.evaluate(model, OBJECTIVE, 1.0, torch.float32, ranks)


def test_noise_levels_are_midpoints_of_eight_equal_parts():
    assert tuple((2 * k + 1) / 16 for k in range(8)) == NOISE_LEVELS


def test_zero_velocity_scores_the_energy_of_noise_minus_data(dit_corpus):
    result = evaluate(dit_corpus, ConstantVelocity(0.0), repeats=8)
    store = LatentStore(dit_corpus / "latents")
    energy = [1 + float(store.read(name).square().mean()) for name in ("image00", "image01")]
    assert result.mean == pytest.approx(sum(energy) / 2, rel=0.03)
    assert result.objective == pytest.approx(result.velocity)


def test_result_repeats_and_does_not_depend_on_the_batch_size(dit_corpus):
    results = {evaluate(dit_corpus, ConstantVelocity(0.3), batch_size=b) for b in (1, 3, 16)}
    assert len(results) == 1
    assert evaluate(dit_corpus, ConstantVelocity(0.3), seed=2) not in results


def test_ranks_share_the_images_and_agree_with_one_process(dit_corpus):
    class Rank(Ranks):
        """Records what this rank would send to the others."""

        def gather(self, value):
            found.append(value)
            return [value]

    found: list = []
    for rank in (0, 1):
        evaluate(dit_corpus, ConstantVelocity(0.3), ranks=Rank(rank, 2, torch.device("cpu")))
    merged = {**found[0], **found[1]}
    assert len(merged) == len(found[0]) + len(found[1]) == 2 * 8 * 2
    whole = evaluate(dit_corpus, ConstantVelocity(0.3))
    means = [
        sum(merged[key][0] for key in sorted(merged) if key[0] == level) / 4 for level in range(8)
    ]
    assert means == pytest.approx(whole.velocity)


def test_metrics_round_trip_and_range_restriction():
    loss = ValidationLoss(tuple(float(k) for k in range(8)), tuple(0.1 * k for k in range(8)))
    assert loss.mean == 3.5
    assert loss.mean_within((0.541, 1.0)) == pytest.approx((4 + 5 + 6 + 7) / 4)
    # Both ends belong to the range.
    assert loss.mean_within((NOISE_LEVELS[4], 0.7)) == 4.5
    assert loss.mean_within((0.6, NOISE_LEVELS[6])) == 5.5
    assert math.isnan(loss.mean_within((0.0, 0.01)))
    assert ValidationLoss.from_metrics(loss.metrics("_ema"), "_ema") == loss


def test_no_held_out_image_is_refused(dit_corpus):
    with pytest.raises(ValueError, match="held-out"):
        ValidationSet(
            LatentStore(dit_corpus / "latents"),
            TextStore(dit_corpus / "texts"),
            [],
            repeats=1,
            batch_size=1,
            seed=0,
        )


def test_packed_tokens_reach_the_model_in_grid_order(dit_corpus):
    seen = []

    class Recorder(ConstantVelocity):
        def forward(self, hidden_states, grid_hw, **_):
            seen.append((hidden_states.shape[1], grid_hw))
            return (torch.zeros_like(hidden_states),)

    evaluate(dit_corpus, Recorder(0.0))
    latent = LatentStore(dit_corpus / "latents").read("image00")
    tokens = pack_latents(latent[None]).shape[1]
    assert (tokens, (latent.shape[1] // 2, latent.shape[2] // 2)) in seen
