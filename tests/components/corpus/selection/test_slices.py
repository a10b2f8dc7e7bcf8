from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpus.pages.overview_figure import save_overview
from components.corpus.selection.bucket_columns import assign_buckets
from components.corpus.selection.slices import SLICES, slices, split
from components.images.aspect_buckets import buckets, nearest_bucket
from components.settings.corpus import SlicesSettings
from components.settings.models import BucketsSettings
from components.settings.schema import load_settings


def slice_settings(**changes: object) -> SlicesSettings:
    values = {
        "vae_top_fraction": 0.5,
        "stage2_top_fraction": 0.05,
        "min_images": 2,
        "ablation_images": 5,
        "eval_fraction": 0.2,
        "eval_min_images": 3,
    }
    return SlicesSettings.model_validate(values | changes)


def corpus(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": [hashlib.sha256(str(n).encode()).hexdigest() for n in range(count)],
            "kept": [True] * count,
            "flat_fraction": [n / count for n in range(count)],
            "aesthetic": [float(n % 7) for n in range(count)],
            "height": [2160 + n for n in range(count)],
            "width": [3840] * count,
        }
    )


@settings(deadline=None)
@given(st.integers(4, 80), st.integers(0, 2**31 - 1))
def test_the_split_has_its_share_and_floor_and_nothing_twice(count: int, seed: int) -> None:
    result = split(corpus(count), slice_settings(), seed)
    assert set(result) <= {"train", "eval"}
    assert (result == "eval").sum() == max(round(0.2 * count), 3)


def test_the_split_depends_on_the_seed_and_not_on_the_row_order() -> None:
    table = corpus(40)
    first = split(table, slice_settings(), 1)
    assert not first.equals(split(table, slice_settings(), 2))
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(split(shuffled, slice_settings(), 1).sort_index(), first)


def test_new_photographs_hardly_move_old_ones() -> None:
    before = split(corpus(200), slice_settings(), 1)
    after = split(corpus(220), slice_settings(), 1)[:200]
    assert (before != after).sum() <= 10


def test_rows_that_are_not_kept_belong_to_no_split() -> None:
    table = corpus(10)
    table["kept"] = pd.Series([None, False, *[True] * 8], dtype=object)
    result = split(table, slice_settings(), 0)
    assert result[:2].isna().all()
    assert result[2:].notna().all()


@settings(deadline=None)
@given(st.integers(4, 80))
def test_slices_are_disjoint_from_evaluation_and_have_their_floors(count: int) -> None:
    table = corpus(count)
    table["split"] = split(table, slice_settings(), 7)
    cut = slices(table, slice_settings())
    train = len(cut["stage1"])
    assert train + len(cut["eval"]) == count
    held_out = set(cut["eval"]["image_id"])
    for name in ("vae", "stage1", "stage2", "ablation"):
        assert held_out.isdisjoint(cut[name]["image_id"])
        assert cut[name].index.is_monotonic_increasing
    assert len(cut["vae"]) == min(train, max(-(-train // 2), 2))
    assert len(cut["stage2"]) == min(train, max(-(-train // 20), 2))


def test_the_vae_sees_the_least_flat_and_stage_2_the_most_beautiful() -> None:
    table = corpus(40)
    table["split"] = split(table, slice_settings(), 7)
    cut = slices(table, slice_settings())
    rest = cut["stage1"].drop(cut["vae"].index)
    assert cut["vae"]["flat_fraction"].max() < rest["flat_fraction"].min()
    rest = cut["stage1"].drop(cut["stage2"].index)
    assert cut["stage2"]["aesthetic"].min() >= rest["aesthetic"].max()


def test_few_images_are_all_held_out_and_leave_no_training_slice() -> None:
    table = corpus(3)
    table["split"] = split(table, slice_settings(), 7)
    cut = slices(table, slice_settings())
    assert [len(cut[name]) for name in SLICES] == [0, 0, 0, 0, 3]


def test_the_ablation_subset_has_its_size_and_the_proportions_of_stage_1() -> None:
    table = corpus(400).assign(split="train", channel=["human", *["general"] * 3] * 100)
    cut = slices(table, slice_settings(ablation_images=80), seed=3)["ablation"]
    assert len(cut) == 80
    assert (cut["channel"] == "human").sum() == 20
    again = slices(table.sample(frac=1, random_state=1), slice_settings(ablation_images=80), 3)
    assert set(again["ablation"]["image_id"]) == set(cut["image_id"])
    other = slices(table, slice_settings(ablation_images=80), seed=4)["ablation"]
    assert set(other["image_id"]) != set(cut["image_id"])


def test_the_ablation_subset_does_not_lie_beside_the_held_out_images() -> None:
    table = corpus(400)
    table["split"] = split(table, slice_settings(), 3)
    cut = slices(table, slice_settings(ablation_images=80), seed=3)
    # Those that a larger share would hold out next: 80 of 320, of which chance takes 20 +- 3.4.
    next_out = split(table, slice_settings(eval_fraction=0.4), 3) == "eval"
    beside = set(table[next_out]["image_id"]) - set(cut["eval"]["image_id"])
    assert len(beside) == 80
    assert len(beside & set(cut["ablation"]["image_id"])) < 40


def test_ties_at_the_border_go_by_image_id_and_missing_scores_come_last() -> None:
    table = corpus(60).assign(split="train")
    table.loc[:9, "aesthetic"] = None
    cut = slices(table, slice_settings(stage2_top_fraction=0.25))["stage2"]
    ranked = table.sort_values(["aesthetic", "image_id"], ascending=[False, True])
    assert set(cut.index) == set(ranked.index[:15])


def test_buckets_are_assigned_where_the_size_is_known() -> None:
    table = pd.DataFrame({"height": [2160, 4000, None], "width": [3840, 4000, None]})
    result = assign_buckets(table, buckets(BucketsSettings(published="table", target_pixels=None)))
    assert result["bucket"].tolist()[:2] == ["3072x5440", "4096x4096"]
    assert result["bucket_height"].tolist()[:2] == [3072, 4096]
    assert result.iloc[2][["bucket", "bucket_height", "bucket_width"]].isna().all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 20000), st.integers(1, 20000)), min_size=1, max_size=30))
def test_the_nearest_buckets_equal_those_found_one_by_one(sizes: list[tuple[int, int]]) -> None:
    known = buckets(BucketsSettings(published="table", target_pixels=None))
    table = pd.DataFrame(sizes, columns=["height", "width"])
    expected = [nearest_bucket(height, width, known).name for height, width in sizes]
    assert assign_buckets(table, known)["bucket"].tolist() == expected


@pytest.mark.parametrize("count", [0, 30])
def test_the_figure_has_the_same_bytes_twice(root: Path, tmp_path: Path, count: int) -> None:
    rules = load_settings(root / "params.yaml").select
    table = corpus(count).assign(aspect_ratio=1.5, entropy_bits=7.2)
    table["kept"] = [n % 3 > 0 for n in range(count)]
    for name in ("a.png", "b.png"):
        save_overview(table, rules, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
