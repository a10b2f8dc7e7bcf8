"""Random numbers that belong to an image: the same for every order and size of the table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

_CHUNK = 65_536


def _each(image_ids: Iterable[str]) -> Iterator[str]:
    """One after the other; a column becomes Python's objects in pieces, not as a whole."""
    if not isinstance(image_ids, pd.Series):
        yield from image_ids
        return
    for start in range(0, len(image_ids), _CHUNK):
        yield from image_ids.iloc[start : start + _CHUNK].tolist()


def uniform_draws(seed: int, image_ids: Iterable[str], purpose: str = "") -> np.ndarray:
    """One number per image from sha256 of (seed, purpose, image_id), uniform on [0, 1).

    Args:
        seed: project seed.
        image_ids: any text; equal ids get equal numbers.
        purpose: makes decisions independent of each other, such as "sample" and "ablation".

    Returns:
        (N,) float64 with 53 random bits.
    """
    prefix = f"{seed}:{purpose}:" if purpose else f"{seed}:"
    # The hash of the common prefix is computed once.
    start = hashlib.sha256(prefix.encode())
    digests = bytearray()
    for image_id in _each(image_ids):
        state = start.copy()
        state.update(image_id.encode())
        digests += state.digest()[:8]
    # 53 bits are what a float64 holds; all 64 would now and then round up to 1.0.
    return (np.frombuffer(bytes(digests), dtype=">u8") >> np.uint64(11)) * 2.0**-53
