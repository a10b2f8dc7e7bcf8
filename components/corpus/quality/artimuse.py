"""ArtiMuse: aesthetics from 0 to 100, read off the logits of 101 score tokens.

ArtiMuse (a vision-language model on InternVL) answers with one of 101 two-letter tokens that
stand for 0 to 100; its score is their expectation. It pins an old transformers, so it runs in an
environment of its own behind `scorer_protocol`; `quality.artimuse_server` is the server.
"""

from __future__ import annotations

from functools import cache, partial
from string import ascii_lowercase
from typing import Any

import cv2
import numpy as np

from components.corpus.derivatives import Derivative
from components.corpus.quality import expectation, scorer_protocol
from components.corpus.quality.expectation import expected_value
from components.corpus.quality.kinds import Kind
from components.corpus.quality.scorer import (
    DerivativeScorer,
    ScoringJob,
    score_row,
    score_schema,
    server_limits,
)
from components.corpus.quality.scorer_protocol import (
    ItemRejected,
    ScorerChanged,
    ScorerClient,
    ScorerIdentity,
    ScorerUnavailable,
)

SCORE_TOKENS = tuple(
    first + ascii_lowercase[offset]
    for first, count in (("a", 26), ("c", 25), ("d", 25), ("e", 25))
    for offset in range(count)
)
"""Two-letter tokens of the scores 0 to 100: aa to az, ca to cy, da to dy, ea to ey (released code;
the letter b is skipped)."""

INPUT_PX = 448
# ImageNet statistics, as in InternVL.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Squash to 448x448 whatever the aspect ratio (bicubic), then normalise.

    Args:
        pixels: (H, W, 3) uint8, RGB.

    Returns:
        (1, 3, 448, 448) float32.
    """
    from PIL import Image

    # The released code squashes, and its weights have seen nothing else; a crop would be more
    # beautiful and another scale.
    small = Image.fromarray(pixels).resize((INPUT_PX, INPUT_PX), Image.Resampling.BICUBIC)
    values = (np.asarray(small, np.float32) / 255 - _MEAN) / _STD
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def score_from_logits(logits: np.ndarray) -> float:
    """Expectation of 0 to 100 under the softmax of the score tokens' logits, in float64.

    Args:
        logits: (101,), in the order of `SCORE_TOKENS`.

    Raises:
        ValueError: another shape, or logits that are not finite.
    """
    return expected_value(logits, np.arange(len(SCORE_TOKENS)))


class LinearTestScorer:
    """The scoring arithmetic over a seeded linear map of an 8x8 thumbnail: for tests of the way.

    Its name says so; it knows nothing of aesthetics.
    """

    name = "test-linear"

    def __init__(self, seed: int) -> None:
        """Draw the map."""
        rng = np.random.default_rng(seed)
        self._weights = rng.standard_normal((len(SCORE_TOKENS), 8 * 8 * 3)) / 8

    @property
    def weights_bytes(self) -> bytes:
        """What the digest of its weights is taken of."""
        return self._weights.tobytes()

    def __call__(self, pixels: np.ndarray) -> float:
        """Score of (H, W, 3) uint8 RGB."""
        values = preprocess(pixels)[0].transpose(1, 2, 0)
        small = cv2.resize(values, (8, 8), interpolation=cv2.INTER_AREA)
        return score_from_logits(self._weights @ small.ravel().astype(np.float64))


@cache
def _client(url: str, timeout_s: float, retries: int) -> ScorerClient:
    """One connection per worker process."""
    return ScorerClient(url, timeout_s=timeout_s, retries=retries)


def score_remotely(
    derivative: Derivative,
    *,
    url: str,
    expected: ScorerIdentity,
    timeout_s: float = 120.0,
    retries: int = 5,
) -> dict[str, Any]:
    """Columns aesthetic, aesthetic_scorer and aesthetic_weights of one derivative.

    A picture that the scorer refuses has an error and no score.

    Raises:
        ScorerUnavailable: the server cannot be reached.
        ScorerChanged: it is another one than at the start of the run.
    """
    try:
        score = _client(url, timeout_s, retries).score(derivative.jpeg, expected)
    except ItemRejected as problem:
        return {"error": f"{expected.scorer}: {problem}"}
    return score_row("aesthetic", score, expected.scorer, expected.weights)


def open_scorer(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    """The server that `quality.artimuse_url` names; asked who it is before anything is scored.

    Raises:
        ScorerUnavailable: no server there.
    """
    url = job.settings.quality.artimuse_url
    assert url is not None, "the settings refuse a scorer without what it needs"
    client = ScorerClient(url)
    # Asked once; every later answer is held against it.
    expected = client.identity()
    client.close()
    return DerivativeScorer(
        partial(score_remotely, url=url, expected=expected),
        score_schema(kind),
        server_limits(job.settings),
        key={"scorer": expected.scorer, "weights": expected.weights},
        modules=(scorer_protocol, expectation),
        outside=(ScorerUnavailable, ScorerChanged),
    )
