"""A score as an expectation: a language model's logits of the words that stand for numbers.

Q-Align and ArtiMuse are asked to complete a sentence, and their answer is not the likeliest word
but the mean over all words that count, weighted by their probability: a score between two levels
is then possible, and a small change of the picture gives a small change of the score.
"""

from __future__ import annotations

import numpy as np


def expected_value(logits: np.ndarray, values: np.ndarray) -> float:
    """Expectation of `values` under the softmax of `logits`, in float64.

    Args:
        logits: (N,), of the words alone: the softmax leaves the rest of the vocabulary out.
        values: (N,), what each word stands for.

    Raises:
        ValueError: another number of logits, or logits that are not finite.
    """
    found = np.asarray(logits, np.float64)
    if found.shape != values.shape or not np.isfinite(found).all():
        raise ValueError(f"logits: expected {len(values)} finite numbers, got {found.shape}")
    # Without the largest logit the exponentials of a sure model would overflow.
    weights = np.exp(found - found.max())
    return float(weights @ values / weights.sum())
