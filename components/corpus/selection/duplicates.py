"""Near-duplicates: stars around keepers among PDQ hashes within a Hamming distance.

Pictures are visited from the best to the worst. One that is not dropped yet is a keeper, and drops
every later one within the limit that is not dropped yet: a greedy maximal independent set. So
nothing is dropped that is further than the limit from its own keeper, no two keepers are within
it, and the outcome depends on the order of the keepers alone. Single linkage joins pictures through
chains of others, 150 bits apart at a limit of 31.

The search is exact. 256 bits are cut into 16 chunks of 16; two hashes at distance d differ by at
most d // 16 bits in some chunk (pigeonhole), so comparing every hash with those whose chunk differs
by that many bits finds every pair: recall 1 for any bound. A first pass finds who has a neighbour
at all; it copies hashes in chunk order, so that the buckets to compare lie next to each other in
memory. Only these few are visited in the order of the keepers, whose walk jumps through memory.
No pair is ever listed: memory does not depend on how many duplicates there are.

Deviation: DESIGN names a faiss binary index. `IndexBinaryMultiHash` uses the same pigeonhole
principle, but asks hash by hash and keeps a set of candidates for each; the tests use faiss as the
independent reference.
"""

from __future__ import annotations

import numba
import numpy as np
import pandas as pd

PDQ_BITS = 256
_CHUNKS = 16
_CHUNK_BITS = PDQ_BITS // _CHUNKS
_MAX_DISTANCE = 47
"""Beyond it every chunk would be compared with 697 buckets; PDQ's false positives start at 31."""

_CROWD = 1 << 24
"""Pairs of two buckets from which on all their hashes count as having a neighbour. A million random
hashes fill buckets with 15, so that many are variants of one picture, and comparing them all would
be quadratic; the walk of the keepers drops them in one go each."""

# Neighbouring PDQ bits are neighbouring frequencies and correlate; bit k goes to place 97 k mod
# 256, so that a chunk holds bits of many frequencies and buckets fill evenly.
_SPREAD = (np.arange(PDQ_BITS) * 97) % PDQ_BITS


def hashes_to_words(hashes: pd.Series) -> np.ndarray:
    """64 hexadecimal digits each to (N, 4) uint64.

    Raises:
        ValueError: a hash of another length or with other characters.
    """
    digits = PDQ_BITS // 4
    if len(hashes) == 0:
        return np.empty((0, 4), np.uint64)
    wrong = hashes[hashes.str.len() != digits]
    if len(wrong):
        raise ValueError(f"pdq_hash: {wrong.iloc[0]!r} is not {digits} hexadecimal digits")
    try:
        raw = bytes.fromhex("".join(hashes))
    except ValueError as problem:
        raise ValueError(f"pdq_hash: not hexadecimal: {problem}") from None
    # Byte order does not matter: distances count bits, wherever they stand.
    return np.frombuffer(raw, np.uint64).reshape(-1, 4)


@numba.njit(cache=True)
def _popcount(word: np.uint64) -> np.uint64:
    """Number of set bits (Hacker's Delight 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@numba.njit(cache=True)
def _masks(flips: int) -> np.ndarray:
    """All ways to flip at most `flips` of 16 bits, (M,) int64."""
    every = np.arange(1 << _CHUNK_BITS)
    return every[np.array([_popcount(np.uint64(mask)) <= flips for mask in every])]


@numba.njit(cache=True)
def _mark_neighbours(
    words: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    keys: np.ndarray,
    chunk: int,
    max_distance: int,
    meets: np.ndarray,
) -> None:
    """Mark in `meets` the hashes with another within `max_distance` that is first met in `chunk`.

    Two hashes meet in a chunk if it differs by one of `_masks`.

    Args:
        words: (N, 4) uint64 in chunk order.
        order: (N,) position of each in `meets` and `keys`.
        starts: (2^16 + 1,) first place of every bucket.
        keys: (16, N) uint16 chunks.
        chunk: row of `keys` that `order` sorts by.
        max_distance: in bits.
        meets: (N,) uint16, bit `chunk` is set in place.
    """
    flips = max_distance // keys.shape[0]
    bit = np.uint16(1 << chunk)
    masks = _masks(flips)
    for key in range(starts.shape[0] - 1):
        first, last = starts[key], starts[key + 1]
        if first == last:
            continue
        for mask in masks:
            other = key ^ mask
            # Every pair of buckets once.
            if other < key:
                continue
            end = starts[other + 1]
            if (last - first) * (end - starts[other]) > _CROWD:
                for place in range(first, last):
                    meets[order[place]] |= bit
                for place in range(starts[other], end):
                    meets[order[place]] |= bit
                continue
            for left in range(first, last):
                a, b = words[left, 0], words[left, 1]
                c, d = words[left, 2], words[left, 3]
                # Inside a bucket every pair once, and none with itself.
                begin = left + 1 if other == key else starts[other]
                for right in range(begin, end):
                    distance = _popcount(a ^ words[right, 0]) + _popcount(b ^ words[right, 1])
                    # Half of 256 random bits differ: nearly every pair ends here.
                    if distance > max_distance:
                        continue
                    distance += _popcount(c ^ words[right, 2]) + _popcount(d ^ words[right, 3])
                    if distance <= max_distance:
                        one, two = order[left], order[right]
                        if not _met_before(keys[:chunk, one], keys[:chunk, two], flips):
                            meets[one] |= bit
                            meets[two] |= bit


@numba.njit(cache=True)
def _met_before(left: np.ndarray, right: np.ndarray, flips: int) -> bool:
    """Whether one of the chunks differs by at most `flips` bits."""
    for place in range(left.shape[0]):
        if _popcount(np.uint64(left[place] ^ right[place])) <= flips:
            return True
    return False


@numba.njit(cache=True)
def _drop_neighbours(
    words: np.ndarray,
    keys: np.ndarray,
    orders: np.ndarray,
    starts: np.ndarray,
    meets: np.ndarray,
    max_distance: int,
) -> np.ndarray:
    """Keeper of every hash, visited from the first to the last.

    Args:
        words: (N, 4) uint64, best first.
        keys: (16, N) uint16 chunks of each.
        orders: (16, N) positions sorted by chunk, equal chunks from the best to the worst.
        starts: (16, 2^16 + 1) first place of every bucket in `orders`.
        meets: (N,) uint16, the chunks in which neighbours are met first: one of all is enough.
        max_distance: in bits.

    Returns:
        (N,) int64, a keeper's own position for a keeper.
    """
    masks = _masks(max_distance // keys.shape[0])
    keeper = np.full(words.shape[0], -1, np.int64)
    for best in range(words.shape[0]):
        if keeper[best] >= 0:
            continue
        keeper[best] = best
        a, b, c, d = words[best, 0], words[best, 1], words[best, 2], words[best, 3]
        for chunk in range(orders.shape[0]):
            if not (meets[best] >> chunk) & 1:
                continue
            for mask in masks:
                bucket = np.int64(keys[chunk, best]) ^ mask
                place = starts[chunk, bucket + 1] - 1
                # Backwards, because only what is worse than the keeper can be dropped by it.
                while place >= starts[chunk, bucket] and orders[chunk, place] > best:
                    later = orders[chunk, place]
                    place -= 1
                    if keeper[later] >= 0:
                        continue
                    distance = _popcount(a ^ words[later, 0]) + _popcount(b ^ words[later, 1])
                    if distance > max_distance:
                        continue
                    distance += _popcount(c ^ words[later, 2]) + _popcount(d ^ words[later, 3])
                    if distance <= max_distance:
                        keeper[later] = best
    return keeper


@numba.njit(cache=True)
def _chunks(words: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """(16, N) uint16 chunks: bit k of all 256 is bit `spread[k]` of the (N, 4) uint64 words."""
    chunks = np.zeros((_CHUNKS, words.shape[0]), np.uint16)
    for row in range(words.shape[0]):
        for chunk in range(_CHUNKS):
            key = np.uint64(0)
            for place in range(_CHUNK_BITS):
                bit = spread[chunk * _CHUNK_BITS + place]
                value = words[row, bit >> 6] >> np.uint64(bit & 63)
                key |= (value & np.uint64(1)) << np.uint64(place)
            chunks[chunk, row] = key
    return chunks


def _sorted_by(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the order of their chunk, and the first place of each of the 2^16 buckets."""
    order = np.argsort(keys, kind="stable")
    return order, np.r_[0, np.cumsum(np.bincount(keys, minlength=1 << _CHUNK_BITS))]


def near_duplicate_stars(words: np.ndarray, max_distance: int) -> np.ndarray:
    """Keeper of every hash: the first in order that is one itself and within `max_distance`.

    Args:
        words: (N, 4) uint64, a hash each, in the order in which they may become keepers.
        max_distance: 0 to 47 bits; PDQ's authors recommend 31.

    Returns:
        (N,) int64 position of the keeper; a keeper names itself.

    Raises:
        ValueError: `max_distance` out of range.
    """
    if not 0 <= max_distance <= _MAX_DISTANCE:
        raise ValueError(f"max_distance is {max_distance}, must lie in 0 to {_MAX_DISTANCE}")
    if len(words) == 0:
        return np.empty(0, np.int64)
    # Equal hashes are one, in the place of the best of them: all have the same neighbours, so all
    # are dropped together or by their best. A million copies of one picture are no million^2 pairs.
    by_value = np.lexsort(words.T[::-1])
    ordered = words[by_value]
    is_new = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
    # The sort is stable: the first of equal hashes is the best.
    best_of_value = by_value[is_new]
    best = np.sort(best_of_value)
    value_of = np.empty(len(words), np.int64)
    value_of[by_value] = np.searchsorted(best, best_of_value)[np.cumsum(is_new) - 1]
    distinct = np.ascontiguousarray(words[best])

    # Distances are taken of the hashes as they are; only the choice of buckets sees spread bits.
    keys = _chunks(distinct, _SPREAD)
    meets = np.zeros(len(distinct), np.uint16)
    for chunk in range(_CHUNKS):
        order, starts = _sorted_by(keys[chunk])
        _mark_neighbours(distinct[order], order, starts, keys, chunk, max_distance, meets)

    few = np.flatnonzero(meets)
    sortings = [_sorted_by(keys[chunk, few]) for chunk in range(_CHUNKS)]
    orders = np.stack([order.astype(np.int32) for order, _ in sortings])
    starts_of = np.stack([starts.astype(np.int32) for _, starts in sortings])
    found = _drop_neighbours(
        distinct[few], keys[:, few], orders, starts_of, meets[few], max_distance
    )
    keeper = np.arange(len(distinct))
    keeper[few] = few[found]
    return np.asarray(best[keeper[value_of]])


def hamming_distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, row by row; (N, 4) uint64 each, (N,) int64."""
    return np.asarray(np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int64))


KEEPER_COLUMNS = ("image_id", "width", "height", "pdq_hash", "pdq_quality", "quality_score")


def keepers(
    table: pd.DataFrame, *, max_distance: int = 31, min_quality: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Who keeps whose place among near-duplicates.

    The order of the keepers: most pixels, then the highest quality score, then the smallest
    image_id. Hashes of featureless pictures (PDQ quality below `min_quality`) match anything alike
    and are not compared. Addresses say nothing: one URL may give different pixels.

    Args:
        table: image_id, width, height, pdq_hash, pdq_quality and, if known, quality_score.
        max_distance: 0 to 47; PDQ's authors recommend 31.
        min_quality: 0 to 100; PDQ's authors recommend 50.

    Returns:
        (N,) int64 position of each row's keeper, its own for keepers and single images, and (N,)
        float64 bits between the two, NaN for a row that is its own keeper.

    Raises:
        ValueError: a malformed hash, or `max_distance` out of range.
    """
    keeper = np.arange(len(table))
    distance = np.full(len(table), np.nan)
    is_hashed = table["pdq_hash"].notna() & (table["pdq_quality"] >= min_quality)
    # image_id is the last key: no tie is left to the order of the rows.
    ranked = (
        pd.DataFrame(
            {
                "pixels": table["width"].astype(float) * table["height"].astype(float),
                "quality": table.get("quality_score", np.nan),
                "image_id": table["image_id"],
            }
        )
        .reset_index(drop=True)[is_hashed.to_numpy()]
        .sort_values(
            ["pixels", "quality", "image_id"], ascending=[False, False, True], na_position="last"
        )
        .index.to_numpy()
    )
    words = hashes_to_words(table["pdq_hash"].iloc[ranked])
    stars = near_duplicate_stars(words, max_distance)
    dropped = np.flatnonzero(stars != np.arange(len(stars)))
    keeper[ranked] = ranked[stars]
    distance[ranked[dropped]] = hamming_distance(words[dropped], words[stars[dropped]])
    return keeper, distance
