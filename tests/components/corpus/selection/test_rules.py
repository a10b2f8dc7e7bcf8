from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpus.selection.quotas import (
    QuotaInfeasible,
    Share,
    quota_sizes,
    smallest_draws,
    stratified_sizes,
)
from components.corpus.selection.rules import (
    REASONS,
    SETTING_OF,
    as_candidates,
    count_by_reason,
    select,
)
from components.settings.corpus import (
    AspectQuotaSettings,
    HumanChannelSettings,
    LicenseSettings,
    SelectSettings,
    ShareSettings,
)

ROOT = Path(__file__).parents[4]
PAPER = SelectSettings(
    exclusions="conf/exclusions.csv",
    licenses=LicenseSettings(allow=None, deny=(), share_alike="mixed"),
    min_pixels=3840 * 2160,
    max_alpha_fraction=0.05,
    max_nsfw=None,
    max_drawing=None,
    max_flat_fraction=0.5,
    min_entropy_bits=7.0,
    min_quality=None,
    near_duplicate_distance=None,
    near_duplicate_min_quality=50,
    aesthetic_top_fraction=1.0,
    human=HumanChannelSettings(
        max_flat_fraction=None,
        min_entropy_bits=6.0,
        min_quality=None,
        aesthetic_top_fraction=None,
    ),
    aspect_quotas=(),
    character_quota=None,
    target_images=None,
)


def rows(*changes: dict[str, object]) -> pd.DataFrame:
    good = {
        "image_id": None,
        "integrity": "ok",
        "duplicate_of": None,
        "width": 3840,
        "height": 2160,
        "flat_fraction": 0.5,
        "entropy_bits": 7.0,
        "quality_score": 4.5,
        "aesthetic": 50.0,
    }
    return pd.DataFrame(
        [good | {"image_id": f"{n:064x}"} | change for n, change in enumerate(changes)]
    )


def test_rights_come_before_measurements_and_move_no_quota() -> None:
    table = rows(
        {"license": "CC-BY-NC-4.0", "width": 10},
        {"license": "CC-BY-SA-4.0"},
        {"license": "CC0", "excluded": True, "integrity": "broken"},
        {"license": "CC0"},
    )
    licenses = LicenseSettings(allow=None, deny=("*-NC*",), share_alike="without")
    strict = PAPER.model_copy(update={"licenses": licenses})
    result = select(table, strict)
    assert result["reject_reason"].tolist() == ["license", "share_alike", "excluded", None]
    alone = select(table.iloc[[3]].drop(columns="excluded"), strict)
    assert result.loc[result["kept"], "image_id"].tolist() == alone["image_id"].tolist()
    # Judged again from its own verdicts, under any other rule.
    assert select(as_candidates(result), PAPER)["reject_reason"].tolist() == [
        "resolution",
        None,
        "excluded",
        None,
    ]


def test_the_paper_rules_on_the_official_values_keep_what_the_sample_readme_lists() -> None:
    with (ROOT / "tests" / "reference" / "signals.csv").open() as file:
        official = {row["file"]: row for row in csv.DictReader(file)}
    names = sorted(path.name for path in (ROOT / "data" / "sample").glob("*.jpg"))
    table = rows(
        *(
            {
                "width": int(official[name]["width"]),
                "height": int(official[name]["height"]),
                "flat_fraction": float(official[name]["flat_percentage"]),
                "entropy_bits": float(official[name]["shannon_entropy"]),
            }
            for name in names
        )
    )
    result = select(table, PAPER).assign(name=names)
    assert result.loc[result["kept"], "name"].tolist() == [
        "blue-wallpaper-portrait-2x3.jpg",
        "boats-on-the-river.jpg",
        "jad-limcaco-square.jpg",
        "lower-antelope-canyon.jpg",
        "mount-batok-java.jpg",
        "red-cherry-leaves.jpg",
        "samuel-zeller-337041.jpg",
        "sean-afnan-5x4.jpg",
        "solus-tiles-dark.jpg",
        "solus-tiles-light.jpg",
        "vents-du-sud.jpg",
    ]
    assert count_by_reason(result) == {
        "candidates": 21,
        "kept": 11,
        "rejected_excluded": 0,
        "rejected_integrity": 0,
        "rejected_duplicate": 0,
        "rejected_license": 0,
        "rejected_share_alike": 0,
        "rejected_resolution": 3,
        "rejected_transparency": 0,
        "rejected_nsfw": 0,
        "rejected_drawing": 0,
        "rejected_flat_fraction": 5,
        "rejected_entropy": 2,
        "rejected_quality": 0,
        "rejected_near_duplicate": 0,
        "rejected_aesthetic": 0,
        "rejected_aspect_quota": 0,
        "rejected_character_quota": 0,
        "rejected_sample": 0,
    }


def test_values_at_a_threshold_are_kept_except_quality_which_must_exceed_it() -> None:
    strict = PAPER.model_copy(update={"min_quality": 4.0})
    result = select(rows({}, {"quality_score": 4.0}, {"quality_score": 4.001}), strict)
    assert result["kept"].tolist() == [True, False, True]


def test_the_first_failing_rule_is_the_reason_with_its_value_and_threshold() -> None:
    bad = {
        "integrity": "empty file",
        "duplicate_of": "x",
        "width": 10,
        "height": 10,
        "flat_fraction": 0.9,
        "entropy_bits": 1.0,
        "quality_score": 1.0,
        "aesthetic": 0.0,
    }
    order = list(bad)
    changes = []
    for start in ("integrity", "duplicate_of", "width", "flat_fraction", "entropy_bits"):
        keys = order[order.index(start) :]
        changes.append({key: bad[key] for key in keys})
    changes += [{"quality_score": 1.0, "aesthetic": 0.0}, {"aesthetic": 0.0}, {}]
    strict = PAPER.model_copy(update={"min_quality": 4.0, "aesthetic_top_fraction": 0.5})
    result = select(rows(*changes), strict)
    assert result["reject_reason"].tolist()[:7] == [
        "integrity",
        "duplicate",
        "resolution",
        "flat_fraction",
        "entropy",
        "quality",
        "aesthetic",
    ]
    assert result["reject_value"].tolist()[2:7] == [100.0, 0.9, 1.0, 1.0, 0.0]
    assert result["reject_threshold"].tolist()[2:7] == [8294400.0, 0.5, 7.0, 4.0, 50.0]
    assert result["kept"].tolist() == [False] * 7 + [True]
    assert pd.isna(result["reject_reason"][7])


def test_a_missing_signal_fails_its_rule() -> None:
    changes = [{"width": None}, {"flat_fraction": None}, {"entropy_bits": None}]
    result = select(rows(*changes), PAPER)
    assert result["reject_reason"].tolist() == ["resolution", "flat_fraction", "entropy"]
    assert result["reject_value"].isna().all()


def test_the_aesthetic_share_is_taken_among_what_passes_everything_else() -> None:
    changes = [{"aesthetic": score} for score in range(10)]
    changes += [{"aesthetic": 99.0, "entropy_bits": 1.0}]
    top = PAPER.model_copy(update={"aesthetic_top_fraction": 0.3})
    result = select(rows(*changes), top)
    assert result.loc[result["kept"], "aesthetic"].tolist() == [7, 8, 9]
    assert result["reject_threshold"][0] == 7.0


def test_ties_at_the_border_are_kept_and_a_lone_image_always_passes() -> None:
    top = PAPER.model_copy(update={"aesthetic_top_fraction": 0.3})
    assert select(rows({}, {}, {}), top)["kept"].all()
    assert select(rows({}), top)["kept"].all()
    assert not select(rows({"aesthetic": None}), top)["kept"].any()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 8), st.one_of(st.none(), st.floats(0, 100))),
        min_size=1,
        max_size=20,
    ),
    st.floats(0.05, 1.0),
)
def test_counts_add_up_input_is_untouched_and_every_rejection_has_a_reason(
    signals: list[tuple[float, float, float | None]], share: float
) -> None:
    keys = ("flat_fraction", "entropy_bits", "aesthetic")
    table = rows(*(dict(zip(keys, row, strict=True)) for row in signals))
    before = table.copy()
    result = select(table, PAPER.model_copy(update={"aesthetic_top_fraction": share}))
    pd.testing.assert_frame_equal(table, before)
    counts = count_by_reason(result)
    assert counts["kept"] + sum(counts[f"rejected_{r}"] for r in REASONS) == len(table)
    assert (result["kept"] == result["reject_reason"].isna()).all()


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_names_a_setting(reason: str) -> None:
    assert "." in SETTING_OF[reason]


def test_the_human_channel_has_its_own_thresholds_and_no_flatness_rule() -> None:
    flat = {"flat_fraction": 0.9, "entropy_bits": 6.5}
    table = rows(flat, flat | {"channel": "human"}, {"channel": "human", "entropy_bits": 5.9})
    result = select(table, PAPER)
    assert result["kept"].tolist() == [False, True, False]
    assert result["reject_threshold"][2] == 6.0


def test_images_without_a_score_count_for_the_share_and_get_no_place_in_it() -> None:
    changes = [{"aesthetic": score} for score in (1.0, 2.0, 3.0, 4.0, *[None] * 6)]
    for share, kept in ((0.3, [2.0, 3.0, 4.0]), (0.9, [1.0, 2.0, 3.0, 4.0])):
        result = select(rows(*changes), PAPER.model_copy(update={"aesthetic_top_fraction": share}))
        assert result.loc[result["kept"], "aesthetic"].tolist() == kept


def test_the_aesthetic_share_is_of_the_whole_or_of_each_channel() -> None:
    changes = [{"aesthetic": float(n), "channel": "human"} for n in range(10)]
    changes += [{"aesthetic": 50.0 + n, "channel": "general"} for n in range(10)]
    top = PAPER.model_copy(update={"aesthetic_top_fraction": 0.5})
    kept = select(rows(*changes), top)["kept"]
    assert kept.tolist() == [False] * 10 + [True] * 10
    own = top.human.model_copy(update={"aesthetic_top_fraction": 0.2})
    kept = select(rows(*changes), top.model_copy(update={"human": own}))["kept"]
    assert np.flatnonzero(kept).tolist() == [8, 9, 15, 16, 17, 18, 19]


def test_transparent_pictures_are_rejected_above_the_share_and_unmeasured_ones_are_not() -> None:
    changes = [{"alpha_fraction": share} for share in (0.0, 0.05, 0.051, None)]
    result = select(rows(*changes), PAPER)
    assert result["reject_reason"].tolist() == [None, None, "transparency", None]
    assert (result["reject_value"][2], result["reject_threshold"][2]) == (0.051, 0.05)
    off = select(rows(*changes), PAPER.model_copy(update={"max_alpha_fraction": None}))
    assert off["kept"].all()


def test_the_nsfw_rule_needs_a_score() -> None:
    changes = [{"nsfw_score": score} for score in (0.1, 0.5, 0.6, None)]
    result = select(rows(*changes), PAPER.model_copy(update={"max_nsfw": 0.5}))
    assert result["kept"].tolist() == [True, True, False, False]
    assert result["reject_value"].tolist()[2] == 0.6


def test_the_drawing_rule_is_off_by_default_and_needs_a_score() -> None:
    changes = [{"drawing_score": score} for score in (0.1, 0.5, 0.6, None)]
    assert select(rows(*changes), PAPER)["kept"].all()
    result = select(rows(*changes), PAPER.model_copy(update={"max_drawing": 0.5}))
    assert result["reject_reason"].tolist() == [None, None, "drawing", "drawing"]
    assert (result["reject_value"][2], result["reject_threshold"][2]) == (0.6, 0.5)
    # A picture that is both is said to be unsafe.
    both = [{"drawing_score": 0.9, "nsfw_score": 0.9}]
    strict = PAPER.model_copy(update={"max_drawing": 0.5, "max_nsfw": 0.5})
    assert select(rows(*both), strict)["reject_reason"].tolist() == ["nsfw"]


def hashes(*bits: int) -> list[str]:
    """Hashes with the lowest `bits` set: two differ by the difference of their numbers."""
    return [f"{(1 << n) - 1:064x}" for n in bits]


def test_nothing_is_dropped_beyond_the_limit_of_a_keeper_that_is_kept() -> None:
    near = PAPER.model_copy(update={"near_duplicate_distance": 31})
    # The second lies between the first and the third, and has most pixels, but no entropy: a star
    # around it would leave one of two pictures that are 60 bits apart.
    table = rows(
        {}, {"width": 9000, "entropy_bits": 1.0}, {}, {"width": 5000}, {"pdq_quality": 49}, {}
    )
    table["pdq_hash"] = hashes(0, 30, 60, 80, 80, 120)
    table["pdq_quality"] = table["pdq_quality"].fillna(100)
    result = select(table, near)
    assert np.flatnonzero(result["kept"]).tolist() == [0, 3, 4, 5]
    assert result["reject_reason"].tolist()[1:3] == ["entropy", "near_duplicate"]
    ids = table["image_id"]
    assert result["duplicate_of"].tolist()[2] == ids[3]
    assert result["duplicate_of"].notna().sum() == 1
    assert (result["reject_value"][2], result["reject_threshold"][2]) == (20, 31)
    again = select(as_candidates(result), near)
    pd.testing.assert_frame_equal(again, result, check_dtype=False)
    # Another limit is a question to the same table.
    stricter = near.model_copy(update={"near_duplicate_distance": 19})
    assert select(as_candidates(result), stricter)["kept"].tolist()[2]
    assert select(table, PAPER)["kept"].sum() == 5


def test_exact_and_near_duplicates_share_a_column_and_keep_their_originals() -> None:
    near = PAPER.model_copy(update={"near_duplicate_distance": 31})
    table = rows({"width": 9000}, {}, {"duplicate_of": "1"}).assign(pdq_quality=100)
    table["pdq_hash"] = hashes(0, 5, 5)
    result = select(table, near)
    assert result["reject_reason"].tolist()[1:] == ["near_duplicate", "duplicate"]
    assert result["duplicate_of"].tolist()[1:] == [table["image_id"][0], "1"]
    pd.testing.assert_frame_equal(select(as_candidates(result), near), result, check_dtype=False)


def quota_settings(**changes: object) -> SelectSettings:
    wide = AspectQuotaSettings(
        name="wide", min_ratio=1.2, max_ratio=100.0, min_share=0.0, max_share=0.5
    )
    return PAPER.model_copy(update={"aspect_quotas": (wide,), **changes})


def test_quotas_hold_and_rejected_rows_name_their_draw() -> None:
    changes: list[dict[str, object]] = [{"is_character": n % 4 == 0} for n in range(60)]
    changes += [{"width": 3000, "height": 3000, "is_character": n % 4 == 0} for n in range(20)]
    person = ShareSettings(min_share=0.4, max_share=1.0)
    table = rows(*changes)
    result = select(table, quota_settings(character_quota=person), seed=5)
    kept = result[result["kept"]]
    assert (kept["width"] == 3840).mean() <= 0.5
    assert kept["is_character"].mean() >= 0.4
    assert len(kept) > 15
    cut = result[result["reject_reason"].isin(["aspect_quota", "character_quota"])]
    assert len(cut) == 80 - len(kept)
    assert (cut["reject_value"] > cut["reject_threshold"].fillna(0)).all()
    shuffled = select(
        table.sample(frac=1, random_state=0), quota_settings(character_quota=person), 5
    )
    assert set(shuffled.loc[shuffled["kept"], "image_id"]) == set(kept["image_id"])


def test_rounding_takes_no_row_from_a_group_that_is_at_its_bound() -> None:
    # 0.07 * 100 is a hair above 7 in floating point, 0.29 * 100 a hair below 29.
    for counts, share in (((7, 93), Share("a", 0.07)), ((29, 71), Share("a", 0.0, 0.29))):
        assert quota_sizes(counts, [share, Share("b")]).tolist() == list(counts)


def test_a_quota_has_its_lowest_ratio_and_not_its_highest() -> None:
    bounds = {"square": (1.0, 1.5, 0.25), "wide": (1.5, 3.0, 1.0)}
    quotas = tuple(
        AspectQuotaSettings(name=name, min_ratio=low, max_ratio=high, min_share=0.0, max_share=most)
        for name, (low, high, most) in bounds.items()
    )
    sizes = [(3000, 3000)] * 6 + [(4500, 3000)] * 6 + [(6000, 2000)] * 6
    table = rows(*({"width": width, "height": height} for width, height in sizes))
    result = select(table, PAPER.model_copy(update={"aspect_quotas": quotas}))
    # 6 of 1.5 are wide, 6 of 3 are in no quota: 4 squares are a quarter of 16.
    kept = result.loc[result["kept"], "width"].value_counts().to_dict()
    assert kept == {3000: 4, 4500: 6, 6000: 6}


def test_a_quota_of_an_absent_group_names_group_and_setting() -> None:
    person = ShareSettings(min_share=0.2, max_share=1.0)
    with pytest.raises(QuotaInfeasible, match=r"select\.character_quota.*character 0"):
        select(rows({}, {}), PAPER.model_copy(update={"character_quota": person}))


def test_the_sample_has_the_wanted_size_and_the_proportions_of_the_strata() -> None:
    changes = [{"bucket": "a" if n < 75 else "b"} for n in range(100)]
    result = select(rows(*changes), PAPER.model_copy(update={"target_images": 20}), seed=1)
    kept = result[result["kept"]]
    assert kept["bucket"].value_counts().to_dict() == {"a": 15, "b": 5}
    assert (result.loc[~result["kept"], "reject_reason"] == "sample").all()
    larger = select(rows(*changes), PAPER.model_copy(update={"target_images": 40}), seed=1)
    assert set(kept["image_id"]) <= set(larger.loc[larger["kept"], "image_id"])


def brute_force_total(counts: list[int], shares: list[Share]) -> int:
    """The largest feasible total, found by trying every split of two groups."""
    return max(
        first + second
        for first in range(counts[0] + 1)
        for second in range(counts[1] + 1)
        if all(
            share.min_share * (first + second) <= n + 1e-9
            and n <= share.max_share * (first + second) + 1e-9
            for n, share in zip((first, second), shares, strict=True)
        )
    )


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(0, 25), st.integers(0, 25)),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
    st.tuples(st.integers(0, 10), st.integers(0, 10)),
)
def test_quota_sizes_are_the_largest_that_hold(
    counts: tuple[int, int], first: tuple[int, int], second: tuple[int, int]
) -> None:
    shares = [
        Share(name, min(pair) / 10, max(pair) / 10)
        for name, pair in zip("ab", (first, second), strict=True)
    ]
    best = brute_force_total(list(counts), shares)
    if best == 0 and sum(counts):
        with pytest.raises(QuotaInfeasible):
            quota_sizes(counts, shares)
        return
    sizes = quota_sizes(counts, shares)
    assert sizes.sum() == best
    for size, count, share in zip(sizes, counts, shares, strict=True):
        assert 0 <= size <= count
        assert share.min_share * best - 1e-6 <= size <= share.max_share * best + 1e-6


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 300))
def test_stratified_sizes_are_proportional_within_one(counts: list[int], target: int) -> None:
    sizes = stratified_sizes(counts, target)
    total = sum(counts)
    assert sizes.sum() == min(target, total)
    for size, count in zip(sizes, counts, strict=True):
        assert size <= count
        assert abs(size - count * min(1.0, target / max(total, 1))) < 1 + 1e-6


def test_the_smallest_draws_are_taken_in_each_group() -> None:
    groups = np.array([0, 1, 0, 1, 0, 2])
    draws = np.array([0.3, 0.9, 0.1, 0.2, 0.2, 0.5])
    taken, border = smallest_draws(groups, draws, [2, 1, 0])
    assert taken.tolist() == [False, False, True, True, True, False]
    assert border[:2].tolist() == [0.2, 0.2]
    assert np.isnan(border[2])
