from __future__ import annotations

import faiss
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from components.corpus.selection.duplicates import (
    hamming_distance,
    hashes_to_words,
    image_url_key,
    mark_near_duplicates,
    near_duplicate_groups,
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


def reference_groups(words: np.ndarray, max_distance: int) -> np.ndarray:
    """Components from faiss' exhaustive range search."""
    raw = words.view(np.uint8)
    index = faiss.IndexBinaryFlat(256)
    index.add(raw)
    # faiss means "less than".
    limits, _, found = index.range_search(raw, max_distance + 1)
    rows = np.repeat(np.arange(len(words)), np.diff(limits).astype(int))
    graph = coo_array((np.ones(len(rows), np.int8), (rows, found)), shape=(len(words),) * 2)
    labels = connected_components(graph, directed=False)[1]
    return pd.Series(np.arange(len(words))).groupby(labels).transform("min").to_numpy()


def test_groups_of_20000_hashes_are_those_of_an_exhaustive_search() -> None:
    words = planted(16_000, 4_000, seed=0)
    expected = reference_groups(words, 31)
    # About 32 of 41 flip counts are within reach.
    assert 2_500 < len(words) - len(np.unique(expected)) < 3_800
    np.testing.assert_array_equal(near_duplicate_groups(words, 31), expected)


@pytest.mark.parametrize("max_distance", [0, 15, 16, 30, 32, 47])
def test_every_bound_is_exact(max_distance: int) -> None:
    words = planted(600, 600, seed=max_distance, max_flips=64)
    expected = reference_groups(words, max_distance)
    np.testing.assert_array_equal(near_duplicate_groups(words, max_distance), expected)


def test_pairs_at_the_bound_belong_together_and_one_bit_further_do_not() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        bits = rng.integers(0, 2, (1, 256), dtype=np.uint8).repeat(2, axis=0)
        places = rng.permutation(256)
        bits[1, places[:31]] ^= 1
        words = np.packbits(bits, axis=1).view(np.uint64)
        assert near_duplicate_groups(words, 31).tolist() == [0, 0]
        bits[1, places[31]] ^= 1
        words = np.packbits(bits, axis=1).view(np.uint64)
        assert near_duplicate_groups(words, 31).tolist() == [0, 1]


def test_a_hundred_thousand_copies_of_one_hash_are_no_quadratic_problem() -> None:
    words = np.repeat(planted(1, 0, seed=3), 100_000, axis=0)
    assert not near_duplicate_groups(words, 31).any()


def test_a_distance_beyond_what_the_chunks_can_find_is_refused() -> None:
    with pytest.raises(ValueError, match="max_distance is 48"):
        near_duplicate_groups(planted(2, 0, seed=0), 48)


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


def test_the_keeper_has_most_pixels_then_quality_then_the_smallest_id() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    four = [base, flipped(base, 5), flipped(base, 9), base]
    marked = mark_near_duplicates(images(four, width=[100, 300, 200, 300]))
    assert marked["duplicate_of"].tolist() == ["id-1", None, "id-1", "id-1"]
    assert marked["duplicate_distance"].tolist()[2:] == [12 - 8, 5]
    marked = mark_near_duplicates(images(four, quality_score=[0.1, np.nan, 0.9, 0.9]))
    assert marked["duplicate_of"].tolist() == ["id-2", "id-2", None, "id-2"]
    marked = mark_near_duplicates(images(four))
    assert marked["duplicate_of"].tolist() == [None, "id-0", "id-0", "id-0"]


def test_the_result_does_not_depend_on_the_order_of_rows() -> None:
    hashes = hexadecimal(planted(300, 300, seed=5))
    table = images(hashes, quality_score=np.random.default_rng(0).random(600))
    expected = mark_near_duplicates(table).set_index("image_id")["duplicate_of"].sort_index()
    shuffled = table.sample(frac=1, random_state=1)
    found = mark_near_duplicates(shuffled).set_index("image_id")["duplicate_of"].sort_index()
    pd.testing.assert_series_equal(found, expected)
    assert expected.notna().sum() > 100


def test_featureless_hashless_damaged_and_known_duplicates_take_no_part() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    table = images(
        [base, base, None, base, base],
        pdq_quality=[100, 49, np.nan, 100, 100],
        duplicate_of=[None, None, None, "id-0", None],
        integrity=["ok", "ok", "ok", "ok", "truncated"],
    )
    assert mark_near_duplicates(table)["duplicate_of"].isna().all()
    assert mark_near_duplicates(table, min_quality=49)["duplicate_of"].tolist()[1] == "id-0"


def test_a_chain_is_one_group_and_tells_its_distance() -> None:
    base = hexadecimal(planted(1, 0, seed=1))[0]
    marked = mark_near_duplicates(images([base, flipped(base, 30), flipped(base, 60)]))
    assert marked["duplicate_of"].tolist() == [None, "id-0", "id-0"]
    assert marked["duplicate_distance"].tolist()[1:] == [30, 60]


def test_equal_urls_join_groups_and_rows_of_one_image_appear_once() -> None:
    one, two = hexadecimal(planted(2, 0, seed=9))
    urls = [None, "http://X.org/a.jpg?b=1&a=2#top", "https://x.org:443/a.jpg?a=2&b=1", None]
    marked = mark_near_duplicates(images([one, one, None, two], image_url=urls))
    assert marked["duplicate_of"].tolist() == [None, "id-0", "id-0", None]
    assert marked["duplicate_distance"].isna().tolist() == [True, False, True, True]
    table = images([one, two])
    twice = pd.concat([table, table.assign(duplicate_of="id-0")])
    assert mark_near_duplicates(twice)["image_id"].tolist() == ["id-0", "id-1"]


def test_tables_without_rows_or_hashes_are_fine() -> None:
    assert len(mark_near_duplicates(images([]))) == 0
    assert mark_near_duplicates(images([None, None]))["duplicate_of"].isna().all()


def test_a_malformed_hash_is_named() -> None:
    with pytest.raises(ValueError, match="'abc' is not 64 hexadecimal digits"):
        mark_near_duplicates(images(["abc"]))
    with pytest.raises(ValueError, match="not hexadecimal"):
        hashes_to_words(pd.Series(["g" * 64]))


def test_distance_of_known_words() -> None:
    words = hashes_to_words(pd.Series(["0" * 64, "f" * 64, "0" * 63 + "3"]))
    assert hamming_distance(words, words[[0, 0, 0]]).tolist() == [0, 256, 2]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Example.ORG:80/A%7Eb.jpg", "https://example.org/A~b.jpg"),
        ("https://a.b/p.jpg?utm_source=x&w=1#f", "https://a.b/p.jpg?w=1"),
        ("https://a.b:8443/p/", "https://a.b:8443/p"),
        (" not a url ", "not a url"),
        ("https://[bad", "https://[bad"),
    ],
)
def test_urls_have_one_spelling(url: str, expected: str) -> None:
    assert image_url_key(url) == expected
    assert image_url_key(expected) == expected
