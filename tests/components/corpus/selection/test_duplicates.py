from __future__ import annotations

import faiss
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpus.selection.duplicates import (
    hamming_distance,
    hashes_to_words,
    keepers,
    near_duplicate_stars,
)


def planted(count: int, copies: int, seed: int, max_flips: int = 40) -> np.ndarray:
    """Random hashes, and `copies` of random ones with 0 to `max_flips` bits flipped."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 256), dtype=np.uint8)
    of = rng.integers(0, count, copies)
    noisy = bits[of]
    for row in noisy:
        row[rng.permutation(256)[: rng.integers(0, max_flips + 1)]] ^= 1
    everything = np.packbits(np.concatenate([bits, noisy]), axis=1)
    return everything[rng.permutation(len(everything))].copy().view(np.uint64)


def reference_stars(words: np.ndarray, max_distance: int) -> list[int]:
    """Keepers from faiss' exhaustive range search, visited one by one."""
    raw = words.view(np.uint8)
    index = faiss.IndexBinaryFlat(256)
    index.add(raw)
    # faiss means "less than".
    limits, _, found = index.range_search(raw, max_distance + 1)
    keeper = list(range(len(words)))
    for best in range(len(words)):
        if keeper[best] == best:
            for other in found[limits[best] : limits[best + 1]]:
                if other > best and keeper[other] == other:
                    keeper[other] = best
    return keeper


def test_stars_of_20000_hashes_are_those_of_an_exhaustive_search() -> None:
    words = planted(16_000, 4_000, seed=0)
    found = near_duplicate_stars(words, 31)
    # About 32 of 41 flip counts are within reach.
    assert 2_500 < (found != np.arange(len(words))).sum() < 3_800
    assert found.tolist() == reference_stars(words, 31)


@pytest.mark.parametrize("max_distance", [0, 15, 16, 30, 32, 47])
def test_every_bound_is_exact(max_distance: int) -> None:
    words = planted(600, 600, seed=max_distance, max_flips=64)
    found = near_duplicate_stars(words, max_distance)
    assert found.tolist() == reference_stars(words, max_distance)


def test_pairs_at_the_bound_belong_together_and_one_bit_further_do_not() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bits = rng.integers(0, 2, (1, 256), dtype=np.uint8).repeat(2, axis=0)
        places = rng.permutation(256)
        bits[1, places[:31]] ^= 1
        words = np.packbits(bits, axis=1).view(np.uint64)
        assert near_duplicate_stars(words, 31).tolist() == [0, 0]
        bits[1, places[31]] ^= 1
        words = np.packbits(bits, axis=1).view(np.uint64)
        assert near_duplicate_stars(words, 31).tolist() == [0, 1]


def walk(steps: list[int], seed: int) -> np.ndarray:
    """Hashes of which each flips `steps[n]` bits of an earlier one: chains, stars and crowds."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (len(steps) + 1, 256), dtype=np.uint8)
    for row, flips in enumerate(steps, start=1):
        bits[row] = bits[rng.integers(0, row)]
        bits[row, rng.permutation(256)[:flips]] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=80), st.integers(0, 47), st.integers(0, 99))
def test_tangled_neighbourhoods_are_those_of_an_exhaustive_search(
    steps: list[int], max_distance: int, seed: int
) -> None:
    words = walk(steps, seed)
    found = near_duplicate_stars(words, max_distance)
    assert found.tolist() == reference_stars(words, max_distance)
    assert hamming_distance(words, words[found]).max() <= max_distance
    assert (found[found] == found).all()


def test_a_crowd_too_large_to_compare_is_dropped_by_the_same_keepers() -> None:
    # Far more pairs than are compared one by one, each hash a variant of one picture's.
    words = np.concatenate([walk([0] + [3] * 9_000, seed=1), planted(500, 200, seed=2)])
    assert near_duplicate_stars(words, 31).tolist() == reference_stars(words, 31)


def test_a_hundred_thousand_copies_of_one_hash_are_no_quadratic_problem() -> None:
    words = np.repeat(planted(1, 0, seed=3), 100_000, axis=0)
    assert not near_duplicate_stars(words, 31).any()


def test_a_distance_beyond_what_the_chunks_can_find_is_refused() -> None:
    with pytest.raises(ValueError, match="max_distance is 48"):
        near_duplicate_stars(planted(2, 0, seed=0), 48)


def hexadecimal(words: np.ndarray) -> list[str]:
    return [row.tobytes().hex() for row in words]


def images(hashes: list[str | None], **columns: object) -> pd.DataFrame:
    count = len(hashes)
    values = {
        "image_id": [f"id-{n}" for n in range(count)],
        "width": [100] * count,
        "height": [100] * count,
        "pdq_hash": hashes,
        "pdq_quality": [100] * count,
        "quality_score": [0.5] * count,
    }
    return pd.DataFrame(values | columns)


def flipped(word: str, bits: int) -> str:
    return f"{int(word, 16) ^ ((1 << bits) - 1):064x}"


def marked(table: pd.DataFrame, **limits: int) -> list[str | None]:
    """image_id of the keeper of each row, None for those that stay."""
    found, distance = keepers(table, **limits)
    assert (np.isnan(distance) == (found == np.arange(len(table)))).all()
    names = table["image_id"].to_numpy()[found]
    return [None if of == own else of for own, of in zip(table["image_id"], names, strict=True)]


def test_the_keeper_has_most_pixels_then_quality_then_the_smallest_id() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    four = [base, flipped(base, 5), flipped(base, 9), base]
    table = images(four, width=[100, 300, 200, 300])
    assert marked(table) == ["id-1", None, "id-1", "id-1"]
    assert keepers(table)[1].tolist()[2:] == [12 - 8, 5]
    assert marked(images(four, quality_score=[0.1, np.nan, 0.9, 0.9])) == [
        *("id-2", "id-2", None, "id-2")
    ]
    assert marked(images(four)) == [None, "id-0", "id-0", "id-0"]
    assert marked(images(four).drop(columns="quality_score")) == marked(images(four))
    unknown = images(four, height=[None, 100, 100, 100])
    assert marked(unknown) == ["id-1", None, "id-1", "id-1"]


def test_the_result_does_not_depend_on_the_order_of_rows() -> None:
    hashes = hexadecimal(walk([20] * 300, seed=5))
    table = images(hashes, quality_score=np.random.default_rng(0).integers(0, 9, 301) / 8)
    expected = dict(zip(table["image_id"], marked(table), strict=True))
    shuffled = table.sample(frac=1, random_state=1)
    assert dict(zip(shuffled["image_id"], marked(shuffled), strict=True)) == expected
    assert 50 < sum(of is not None for of in expected.values()) < 250


def test_featureless_and_hashless_pictures_take_no_part() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    table = images([base, base, None, base], pdq_quality=[100, 49, np.nan, 100])
    assert marked(table) == [None, None, None, "id-0"]
    assert marked(table, min_quality=49) == [None, "id-0", None, "id-0"]


def test_a_chain_keeps_both_ends_because_nothing_is_dropped_beyond_the_limit() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    chain = [flipped(base, bits) for bits in (0, 30, 60, 90, 120)]
    table = images(chain)
    assert marked(table) == [None, "id-0", None, "id-2", None]
    assert keepers(table)[1][[1, 3]].tolist() == [30, 30]
    # The best picture stands in the middle: it takes both neighbours, the ends stay.
    assert marked(images(chain, width=[1, 1, 9, 1, 1])) == [None, "id-2", None, "id-2", None]


def test_an_address_says_nothing_about_pixels() -> None:
    one, two = hexadecimal(planted(2, 0, seed=9))
    table = images([one, two, None], image_url=["https://x.org/a.jpg"] * 3)
    assert marked(table) == [None, None, None]


def test_tables_without_rows_or_hashes_are_fine() -> None:
    assert marked(images([])) == []
    assert marked(images([None, None])) == [None, None]


def test_a_malformed_hash_is_named() -> None:
    with pytest.raises(ValueError, match="'abc' is not 64 hexadecimal digits"):
        keepers(images(["abc"]))
    with pytest.raises(ValueError, match="not hexadecimal"):
        hashes_to_words(pd.Series(["g" * 64]))


def test_distance_of_known_words() -> None:
    words = hashes_to_words(pd.Series(["0" * 64, "f" * 64, "0" * 63 + "3"]))
    assert hamming_distance(words, words[[0, 0, 0]]).tolist() == [0, 256, 2]
