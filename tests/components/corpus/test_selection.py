from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpus.selection import REASONS, SETTING_OF, count_by_reason, select
from components.corpus.settings import SelectSettings

ROOT = Path(__file__).parents[3]
PAPER = SelectSettings(
    min_pixels=3840 * 2160,
    max_flat_fraction=0.5,
    min_entropy_bits=7.0,
    min_quality=None,
    aesthetic_top_fraction=1.0,
)


def rows(*changes: dict[str, object]) -> pd.DataFrame:
    good = {
        "integrity": "ok",
        "duplicate_of": None,
        "width": 3840,
        "height": 2160,
        "flat_fraction": 0.5,
        "entropy_bits": 7.0,
        "quality_score": 4.5,
        "aesthetic": 50.0,
    }
    return pd.DataFrame([good | change for change in changes])


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
        "rejected_integrity": 0,
        "rejected_duplicate": 0,
        "rejected_resolution": 3,
        "rejected_flat_fraction": 5,
        "rejected_entropy": 2,
        "rejected_quality": 0,
        "rejected_aesthetic": 0,
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
    assert result["reject_reason"].tolist()[:7] == list(REASONS)
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
