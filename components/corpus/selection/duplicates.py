"""Near-duplicates: PDQ hashes within a Hamming distance, equal URLs, one keeper per group.

The range search is exact. 256 bits are cut into 16 chunks of 16; two hashes at distance d differ by
at most d // 16 bits in some chunk (pigeonhole), so comparing every hash with those whose chunk
differs by that many bits finds every pair: recall 1 for any bound. Hashes are copied in chunk order
first, so that the buckets to compare lie next to each other in memory, and pairs are merged into
groups as they are found, never listed: memory does not depend on how many duplicates there are.

Deviation: DESIGN names a faiss binary index. `IndexBinaryMultiHash` uses the same pigeonhole
principle, but asks hash by hash and keeps a set of candidates for each; the tests use faiss as the
independent reference.
"""

from __future__ import annotations

from itertools import combinations
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import numba
import numpy as np
import pandas as pd

PDQ_BITS = 256
_CHUNKS = 16
_CHUNK_BITS = PDQ_BITS // _CHUNKS
_MAX_DISTANCE = 47
"""Beyond it every chunk would be compared with 697 buckets; PDQ's false positives start at 31."""

# Neighbouring PDQ bits are neighbouring frequencies and correlate; bit k goes to place 97 k mod
# 256, so that a chunk holds bits of many frequencies and buckets fill evenly.
_SPREAD = (np.arange(PDQ_BITS) * 97) % PDQ_BITS

_TRACKING_PARAMETERS = ("utm_", "fbclid", "gclid", "ixid", "ref_")
_DEFAULT_PORTS = {"http": 80, "https": 443}


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
def _root(parent: np.ndarray, node: int) -> int:
    while parent[node] != node:
        # Path halving: later walks are short, and nothing recurses inside compiled code.
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True)
def _join_chunk(
    words: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    masks: np.ndarray,
    max_distance: int,
    parent: np.ndarray,
) -> None:
    """Merge all pairs within `max_distance` whose chunk differs by one of `masks`.

    Args:
        words: (N, 4) uint64 in chunk order.
        order: (N,) position of each in `parent`.
        starts: (2^16 + 1,) first place of every bucket.
        masks: differences to look at; 0 is the bucket itself.
        max_distance: in bits.
        parent: (N,) union-find forest, changed in place.
    """
    for key in range(starts.shape[0] - 1):
        first, last = starts[key], starts[key + 1]
        if first == last:
            continue
        for mask in masks:
            other = key ^ mask
            # Every pair of buckets once.
            if other < key:
                continue
            for left in range(first, last):
                a, b = words[left, 0], words[left, 1]
                c, d = words[left, 2], words[left, 3]
                # Inside a bucket every pair once, and none with itself.
                begin = left + 1 if other == key else starts[other]
                for right in range(begin, starts[other + 1]):
                    distance = _popcount(a ^ words[right, 0]) + _popcount(b ^ words[right, 1])
                    # Half of 256 random bits differ: nearly every pair ends here.
                    if distance > max_distance:
                        continue
                    distance += _popcount(c ^ words[right, 2]) + _popcount(d ^ words[right, 3])
                    if distance <= max_distance:
                        one, two = _root(parent, order[left]), _root(parent, order[right])
                        # The smaller root wins, so that a group's name does not depend on the order
                        # of the pairs.
                        parent[max(one, two)] = min(one, two)


@numba.njit(cache=True)
def _roots(parent: np.ndarray) -> np.ndarray:
    found = np.empty_like(parent)
    for node in range(parent.shape[0]):
        found[node] = _root(parent, node)
    return found


def _masks(max_distance: int) -> np.ndarray:
    """All ways to flip at most `max_distance // 16` of 16 bits."""
    flips = range(max_distance // _CHUNKS + 1)
    return np.array(
        [sum(1 << bit for bit in bits) for n in flips for bits in combinations(range(16), n)],
        np.int64,
    )


def near_duplicate_groups(words: np.ndarray, max_distance: int) -> np.ndarray:
    """Connected components of the graph "Hamming distance at most `max_distance`".

    Args:
        words: (N, 4) uint64, a hash each.
        max_distance: 0 to 47 bits; PDQ's authors recommend 31.

    Returns:
        (N,) int64 group of every hash: the position of its first member.

    Raises:
        ValueError: `max_distance` out of range.
    """
    if not 0 <= max_distance <= _MAX_DISTANCE:
        raise ValueError(f"max_distance is {max_distance}, must lie in 0 to {_MAX_DISTANCE}")
    if len(words) == 0:
        return np.empty(0, np.int64)
    # Equal hashes first, so that a million copies of one picture are no million^2 pairs.
    by_value = np.lexsort(words.T[::-1])
    ordered = words[by_value]
    is_new = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
    distinct_of = np.cumsum(is_new) - 1
    distinct = np.ascontiguousarray(ordered[is_new])

    # Distances are taken of the hashes as they are; only the choice of buckets sees spread bits.
    bits = np.unpackbits(distinct.view(np.uint8), axis=1)
    spread = np.ascontiguousarray(np.packbits(bits[:, _SPREAD], axis=1))
    # Eight times the hashes: 256 MB for a million of them.
    del bits
    chunks = spread.view(np.uint16)
    parent = np.arange(len(distinct))
    masks = _masks(max_distance)
    # A pair may be found in several passes; joining it again changes nothing.
    for chunk in range(_CHUNKS):
        keys = chunks[:, chunk]
        order = np.argsort(keys, kind="stable")
        counts = np.bincount(keys, minlength=1 << _CHUNK_BITS)
        starts = np.r_[0, np.cumsum(counts)]
        _join_chunk(distinct[order], order, starts, masks, max_distance, parent)

    group_of_distinct = _roots(parent)[distinct_of]
    first = np.full(len(distinct), len(words), np.int64)
    # Back to the caller's order, in which a group is named by its first member.
    np.minimum.at(first, group_of_distinct, by_value)
    groups = np.empty(len(words), np.int64)
    groups[by_value] = first[group_of_distinct]
    return groups


def hamming_distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, row by row; (N, 4) uint64 each, (N,) int64."""
    return np.asarray(np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int64))


def image_url_key(url: str) -> str:
    """One spelling for URLs that name the same image.

    Scheme and host in lower case, default port, fragment, tracking parameters and a trailing slash
    gone, query sorted, percent escapes in one form. Parameters that choose a rendition (`w`, `fm`)
    stay: they change the bytes. http and https are one.

    Args:
        url: absolute; anything else comes back stripped of white space.
    """
    url = url.strip()
    try:
        # Both lines may raise: a port is checked only when it is read.
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return url
    if parts.scheme.lower() not in _DEFAULT_PORTS or not parts.hostname:
        return url
    host = parts.hostname.rstrip(".")
    if port is not None and port != _DEFAULT_PORTS[parts.scheme.lower()]:
        host = f"{host}:{port}"
    # Trackers change nothing that is downloaded, and order means nothing to most servers.
    query = sorted(
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not name.lower().startswith(_TRACKING_PARAMETERS)
    )
    path = quote(unquote(parts.path), safe="/~-._!$&'()*+,;=:@").rstrip("/")
    return urlunsplit(("https", host, path, urlencode(query), ""))


def _merge(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Components of two partitions together; `labels` below 0 belong to no group."""
    # Here, not above: only tables with URLs need it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # The labels' groups are chained to their first row; components of the union do the rest.
    count = len(groups)
    rows = np.flatnonzero(labels >= 0)
    first = pd.Series(rows).groupby(labels[rows]).transform("min").to_numpy()
    left, right = np.r_[np.arange(count), rows], np.r_[groups, first]
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    components: np.ndarray = connected_components(graph, directed=False)[1]
    return components.astype(np.int64)


def mark_near_duplicates(
    table: pd.DataFrame, *, max_distance: int = 31, min_quality: int = 50
) -> pd.DataFrame:
    """Groups of near-duplicates, each with one keeper.

    Two images belong together when their PDQ hashes differ by at most `max_distance` bits or their
    normalised URLs are equal, directly or through others. Kept is the one with most pixels, then
    with the highest quality score, then with the smallest image_id. Hashes of featureless pictures
    (PDQ quality below `min_quality`) match anything alike and are not compared.

    Args:
        table: image_id, width, height, pdq_hash, pdq_quality; quality_score and image_url if
            known. Rows already marked in `duplicate_of` and those whose `integrity` is not "ok"
            take no part.
        max_distance: 0 to 47; PDQ's authors recommend 31.
        min_quality: 0 to 100; PDQ's authors recommend 50.

    Returns:
        one row per distinct image_id of `table`, in the order of first appearance: image_id,
        duplicate_of (image_id of the keeper; None for keepers and single images) and
        duplicate_distance (bits between the two, which exceeds `max_distance` where a chain of
        others connects them; NaN where no hash was compared).

    Raises:
        ValueError: a malformed hash, or `max_distance` out of range.
    """
    takes_part = pd.Series(True, index=table.index)
    if "duplicate_of" in table:
        takes_part &= table["duplicate_of"].isna()
    if "integrity" in table:
        takes_part &= table["integrity"] == "ok"
    images = table[takes_part].drop_duplicates("image_id").reset_index(drop=True)

    is_hashed = images["pdq_hash"].notna() & (images["pdq_quality"] >= min_quality)
    hashed = np.flatnonzero(is_hashed)
    words = np.zeros((len(images), 4), np.uint64)
    words[hashed] = hashes_to_words(images["pdq_hash"].iloc[hashed])
    # Alone until proven otherwise, so that pictures without a usable hash stay.
    groups = np.arange(len(images))
    groups[hashed] = hashed[near_duplicate_groups(words[hashed], max_distance)]
    if "image_url" in images and images["image_url"].notna().any():
        urls = images["image_url"].map(image_url_key, na_action="ignore")
        # factorize gives -1 to rows without a URL: they must not form a group of their own.
        groups = _merge(groups, pd.factorize(urls)[0])

    quality = images.get("quality_score", np.nan)
    # image_id is the last key: no tie is left to the order of the rows.
    ranked = pd.DataFrame(
        {
            "group": groups,
            "pixels": images["width"].astype(float) * images["height"].astype(float),
            "quality": quality,
            "image_id": images["image_id"],
        }
    ).sort_values(
        ["group", "pixels", "quality", "image_id"],
        ascending=[True, False, False, True],
        na_position="last",
    )
    keeper = pd.Series(ranked.index, index=ranked.index).groupby(ranked["group"]).transform("first")
    keepers = keeper.sort_index().to_numpy()
    is_copy = keepers != np.arange(len(images))
    # A distance only where both hashes mean something.
    is_compared = is_copy & is_hashed.to_numpy() & is_hashed.to_numpy()[keepers]
    marked = pd.DataFrame(
        {
            "image_id": images["image_id"],
            "duplicate_of": images["image_id"].to_numpy()[keepers],
            "duplicate_distance": hamming_distance(words, words[keepers]).astype(float),
        }
    )
    marked["duplicate_of"] = marked["duplicate_of"].astype(object).where(is_copy, None)
    marked["duplicate_distance"] = marked["duplicate_distance"].where(is_compared)
    # Rows that took no part come back too: the caller maps by image_id.
    everyone = table[["image_id"]].drop_duplicates()
    merged = everyone.merge(marked, on="image_id", how="left").reset_index(drop=True)
    merged["duplicate_of"] = merged["duplicate_of"].astype(object)
    merged["duplicate_of"] = merged["duplicate_of"].where(merged["duplicate_of"].notna(), None)
    return merged
