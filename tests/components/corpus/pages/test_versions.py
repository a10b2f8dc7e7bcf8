"""What-if, diff, drift and datasheet: questions about one corpus and two versions of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, ks_2samp

from components.corpus.manifest import SCHEMA, to_arrow
from components.corpus.pages.corpus_diff import diff
from components.corpus.pages.datasheet import datasheet_page
from components.corpus.pages.drift import (
    FeatureDrift,
    drift_page,
    measure_drift,
    population_stability,
)
from components.corpus.selection.rules import select
from components.corpus.selection.slices import slices, split
from components.corpus.selection.what_if import WhatIfError, changed_settings, to_json, what_if
from components.corpus.sources.record_fields import Coverage
from components.corpus.sources.records.source_records import SourceEnd, SourceRecord
from components.settings.schema import Settings, load_settings

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def params() -> Settings:
    return load_settings(ROOT / "params.yaml")


def corpus(params: Settings, count: int = 300, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"image_id": [f"{n:064x}" for n in range(count)]}).assign(
        uri=[f"photos/<{n}>.jpg" for n in range(count)],
        width=rng.choice([3840, 5000], count),
        height=2500,
        megapixels=10.0,
        aspect_ratio=rng.choice([1.536, 2.0], count),
        integrity="ok",
        duplicate_of=None,
        entropy_bits=rng.uniform(6, 8, count),
        flat_fraction=rng.uniform(0, 1, count),
        quality_score=0.5,
        aesthetic=rng.normal(50, 10, count),
        aesthetic_scorer="a",
        channel="general",
        caption_en="two words",
        caption_status="ok",
        license=rng.choice(["CC0-1.0", "CC-BY-4.0"], count),
    )
    return select(table.reindex(columns=SCHEMA.names), params.select)


def test_what_if_equals_a_new_selection_and_names_rows_both_ways(params: Settings) -> None:
    table = corpus(params)
    changed = changed_settings(params.select, ["entropy_bits=6.8", "flat=0.4"][:1])
    changed = changed_settings(changed, ["max_flat_fraction=0.4"])
    found = what_if(table, params.select, changed, 0)
    again = select(table, changed)
    assert found.then["kept"] == again["kept"].sum()
    assert found.now["kept"] == table["kept"].sum()
    assert len(found.gained) == (again["kept"] & ~table["kept"]).sum() > 0
    assert len(found.lost) == (table["kept"] & ~again["kept"]).sum() > 0
    assert set(found.gained["reject_reason"]) == {"entropy"}
    assert set(found.lost["reject_reason"]) == {"flat_fraction"}
    document = json.loads(json.dumps(to_json(found, ["x"])))
    assert document["lost_examples"][0]["reject_threshold"] == 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("entropi_bits=6.8", "did you mean 'entropy_bits'"),
        ("entropy_bits", "KEY=VALUE"),
        ("entropy_bits=9", "min_entropy_bits = 9"),
        ("near_duplicate_distance=48", "near_duplicate_distance = 48"),
    ],
)
def test_a_change_that_cannot_be_tried_is_one_line(
    params: Settings, change: str, message: str
) -> None:
    with pytest.raises(WhatIfError, match=message) as caught:
        changed_settings(params.select, [change])
    assert "\n" not in str(caught.value)


def test_every_key_has_short_names(params: Settings) -> None:
    changes = ["pixels=5", "select.min_quality=4", "aesthetic=0.3", "human.entropy=6", "nsfw=0.5"]
    changed = changed_settings(params.select, changes)
    assert changed.min_pixels == 5
    assert (changed.min_quality, changed.aesthetic_top_fraction) == (4, 0.3)
    assert (changed.human.min_entropy_bits, changed.max_nsfw) == (6, 0.5)


def test_the_diff_of_equal_versions_is_empty(params: Settings) -> None:
    found = diff(corpus(params), corpus(params))
    assert found.rows.empty
    assert set(found.counts().values()) == {0}
    assert found.by_rule() == {"newly_kept": {}, "newly_rejected": {}}


def test_every_kind_of_change_is_found_in_its_row(params: Settings) -> None:
    before = corpus(params)
    kept = before.index[before["kept"]]
    after = before.copy()
    after.loc[kept[0], "entropy_bits"] = 1.0
    after.loc[kept[1], "caption_en"] = "three words now"
    after.loc[kept[2], "license"] = None
    new = before.iloc[[0]].assign(image_id="f" * 64, uri="photos/new.jpg")
    after = select(pd.concat([after.drop(kept[3]), new], ignore_index=True), params.select)
    found = diff(before, after)
    counts = found.counts()
    assert {k: v for k, v in counts.items() if v} == {
        "added": 1,
        "removed": 1,
        "newly_rejected": 1,
        "caption": 1,
        "values": 1,
    }
    assert found.by_rule()["newly_rejected"] == {"entropy": 1}
    rejected = found.rows[found.rows["change"] == "newly_rejected"].iloc[0]
    assert (rejected["reason_after"], rejected["value_after"]) == ("entropy", 1.0)
    assert "entropy_bits" in rejected["columns"].split()
    assert found.by_column()["caption_en"] == found.by_column()["license"] == 1


def test_a_coded_column_that_only_one_version_fills_is_compared(params: Settings) -> None:
    after = corpus(params).astype({"caption_status": "category"})
    nothing = pd.Series(pd.Categorical([None] * len(after)), after.index)
    found = diff(after.assign(caption_status=nothing), after)
    assert found.by_column() == {"caption_status": len(after)}
    assert diff(after, after.assign(caption_status=nothing)).counts()["caption"] > 0


def test_drift_statistics_have_their_known_values() -> None:
    a = np.random.default_rng(0).normal(size=900)
    assert population_stability(a, a) == 0.0
    # Half of the mass moves out of the lower half: (0.5 - 1) ln(0.5 / 1) per bin pair by hand.
    low = np.repeat([0.0, 1.0], 100)
    high = np.repeat([0.0, 1.0], [50, 150])
    by_hand = (0.25 - 0.5) * np.log(0.25 / 0.5) + (0.75 - 0.5) * np.log(0.75 / 0.5)
    assert population_stability(low, high) == pytest.approx(by_hand)
    # A bin that the newer version lacks counts as a ten thousandth.
    gone = (1 - 0.5) * np.log(1 / 0.5) + (1e-4 - 0.5) * np.log(1e-4 / 0.5)
    assert population_stability(low, np.zeros(70)) == pytest.approx(gone)
    # A bin holds its lower edge and not its upper one, as those of a histogram.
    assert population_stability(low, np.repeat([0.2, 1.0], 35)) == 0.0


def feature(before: pd.DataFrame, after: pd.DataFrame, name: str) -> FeatureDrift:
    return next(f for f in measure_drift(before, after).features if f.name == name)


def kept_rows(count: int, **columns: object) -> pd.DataFrame:
    rng = np.random.default_rng(count)
    table = pd.DataFrame({"kept": True, "entropy_bits": rng.uniform(7, 8, count)})
    return table.assign(**columns)


def test_one_row_of_eleven_is_no_drift_and_the_same_among_thousands_is() -> None:
    eleven = kept_rows(11)
    moved = eleven.assign(entropy_bits=eleven["entropy_bits"] + 0.4 * (eleven.index == 3))
    found = feature(eleven, moved, "entropy_bits")
    # By its size alone it would be drift: so did PSI call it.
    assert found.psi is not None
    assert found.psi > 0.25
    assert (found.status, measure_drift(eleven, moved).status) == ("too_few_rows",) * 2
    many = [pd.concat([table] * 300, ignore_index=True) for table in (eleven, moved)]
    again = feature(*many, "entropy_bits")
    assert again.psi == pytest.approx(found.psi, rel=0.2)
    assert again.status == "drifted"
    # Eleven against eleven others altogether can be told.
    assert (
        feature(
            eleven, eleven.assign(entropy_bits=eleven["entropy_bits"] + 5), "entropy_bits"
        ).status
        == "drifted"
    )


def test_what_is_significant_and_small_is_stable() -> None:
    before = kept_rows(20_000)
    after = before.assign(entropy_bits=before["entropy_bits"] + 0.03)
    found = feature(before, after, "entropy_bits")
    assert found.p_value is not None
    assert found.p_value < 0.001
    assert found.status == "stable"


def test_p_values_are_those_of_scipy_corrected_for_all_tests() -> None:
    before = kept_rows(60, megapixels=np.arange(60.0), channel="general")
    after = kept_rows(50, megapixels=np.arange(50.0), channel=["general"] * 38 + ["human"] * 12)
    found = {f.name: f.p_values for f in measure_drift(before, after).features}
    # entropy and megapixels by two tests each, channel by one; nothing is missing anywhere.
    assert {name: set(tests) for name, tests in found.items()} == {
        "entropy_bits": {"psi", "ks"},
        "megapixels": {"psi", "ks"},
        "channel": {"psi"},
    }
    channel = chi2_contingency([[60, 0], [38, 12]], correction=False).pvalue
    assert found["channel"]["psi"] == pytest.approx(5 * channel)
    alone = [table[["kept", "megapixels"]] for table in (before, after)]
    ks = ks_2samp(before["megapixels"], after["megapixels"]).pvalue
    # The smaller of two.
    assert feature(*alone, "megapixels").p_values["ks"] == pytest.approx(2 * ks)


def test_missing_values_are_judged_by_their_number() -> None:
    few, many = kept_rows(11, license="CC0-1.0"), kept_rows(600, license="CC0-1.0")

    def without(table: pd.DataFrame, rows: int) -> pd.DataFrame:
        return table.assign(license=[None] * rows + ["CC0-1.0"] * (len(table) - rows))

    assert feature(few, without(few, 1), "license").status == "too_few_rows"
    assert feature(many, without(many, 5), "license").status == "stable"
    assert feature(many, without(many, 60), "license").status == "shifted"
    gone = many.assign(entropy_bits=np.nan)
    assert feature(many, gone, "entropy_bits").status == "drifted"
    assert feature(few.head(1), gone.head(1), "entropy_bits").status == "too_few_rows"
    # A version that keeps nothing is no matter of chance.
    none_kept = measure_drift(many, many.assign(kept=False))
    assert none_kept.status == "drifted"
    assert {one.missing_after for one in none_kept.features} == {1.0}


def test_versions_of_the_same_source_are_called_stable() -> None:
    for count in (5, 30, 300, 3000):
        before, after = (kept_rows(count + extra, channel="general") for extra in (0, 1))
        assert measure_drift(before, after).status in ("stable", "too_few_rows"), count


def test_drift_names_what_moved_and_pages_need_nothing_from_outside(params: Settings) -> None:
    before, after = corpus(params, 600), corpus(params, 600, seed=1)
    calm = measure_drift(before, before)
    assert calm.status == "stable"
    moved = after.assign(aesthetic=after["aesthetic"] + 8, caption_status="too_short")
    report = measure_drift(before, moved)
    found = {feature.name: feature.status for feature in report.features}
    assert found["aesthetic"] == found["caption_status"] == report.status == "drifted"
    other = measure_drift(before, before.assign(aesthetic_scorer="b"))
    assert (
        next(f for f in other.features if f.name == "aesthetic").note == "aesthetic_scorer: a -> b"
    )
    json.dumps(report.to_json())
    pages = [drift_page(report, before, moved) for _ in range(2)]
    assert pages[0] == pages[1]
    assert not re.search(r"<script|src=|(?<!xlink:)href=\"http", pages[0])


def test_the_datasheet_counts_and_is_the_same_bytes_twice(params: Settings) -> None:
    table = corpus(params)
    table["split"] = split(table, params.slices, 0)
    table.loc[table.index[table["kept"]][0], "license"] = "<b>mine</b>"
    pages = [datasheet_page(table, slices(table, params.slices)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert f"{int(table['kept'].sum())} kept" in pages[0]
    assert "&lt;b&gt;mine" in pages[0]
    assert "<b>mine" not in pages[0]
    for name in ("vae", "stage2", "ablation", "entropy (bits)", "flat fraction"):
        assert name in pages[0]
    assert "drawing score" not in pages[0]
    drawn = table.assign(drawing_score=0.25, nsfw_scorer="nsfwjs 4.4.0")
    page = datasheet_page(drawn, slices(drawn, params.slices))
    assert "drawing score by nsfwjs 4.4.0: median" in page
    assert "0.25, 5% to 95%: 0.25 to" in page
    empty = table.assign(kept=False, split=None)
    assert "0 kept" in datasheet_page(empty, slices(empty, params.slices))


def test_the_datasheet_shows_the_ledger_of_the_source(params: Settings) -> None:
    coverage = Coverage(records=4, kept=2, losses={"not_found": 1, "broken_record": 1})
    for file, losses in (("good.csv", 0), ("<bad>.csv", 1)):
        for number in range(1 + losses):
            values = None if number else {"url": "x"}
            coverage.ledger.add(SourceRecord(f"{file}:{number}", values, units=3))
        end = SourceEnd(file, "lines", 4 + 3 * losses, {"header": 1}, {"loosely_quoted": 7})
        coverage.ledger.close(end)
    table = corpus(params)
    table["split"] = split(table, params.slices, 0)
    tables = slices(table, params.slices)
    # As the stage reads it.
    report = json.loads(json.dumps(coverage.report()))
    page = re.sub(r"\s+", " ", datasheet_page(table, tables, report))
    cells = ("lines", 2, 11, "2 over 6", "1 over 3", "2 header", "14 loosely_quoted")
    for cell in cells:
        assert re.search(rf"<td[^>]*>{cell}</td>", page), cell
    assert "not_found" in page
    assert "<td>&lt;bad&gt;.csv</td>" in page
    assert "good.csv" not in page
    # A folder of photographs has no such files.
    assert "What the source held" not in datasheet_page(table, tables, Coverage().report())


def _value(cell: object) -> object:
    return None if pd.isna(cell) else cell


def row_by_row(before: pd.DataFrame, after: pd.DataFrame) -> list[dict[str, object]]:
    """The obvious comparison: a dictionary of rows, one pair after the other."""
    old = {(row["uri"], row["image_id"]): row for row in before.to_dict("records")}
    seen, found = set(), []

    def entry(row: dict[str, object], change: str) -> dict[str, object]:
        names = ("reason", "value", "threshold")
        empty = {f"{name}_{when}": None for name in names for when in ("before", "after")}
        key = {"image_id": row["image_id"], "uri": row["uri"], "change": change}
        return key | empty | {"columns": None}

    def verdict(row: dict[str, object], when: str) -> dict[str, object]:
        names = ("reason", "value", "threshold")
        return {f"{name}_{when}": _value(row[f"reject_{name}"]) for name in names}

    added = []
    for row in after.to_dict("records"):
        key = (row["uri"], row["image_id"])
        if key not in old:
            added.append(entry(row, "added") | verdict(row, "after"))
            continue
        seen.add(key)
        past = old[key]
        names = [n for n in after.columns if n in past and _value(past[n]) != _value(row[n])]
        if not names:
            continue
        was, is_kept = _value(past["kept"]) is True, _value(row["kept"]) is True
        change = "values"
        if {"caption_en", "caption_zh", "caption_status"} & set(names):
            change = "caption"
        if "reject_reason" in names:
            change = "other_reason"
        if was != is_kept:
            change = "newly_kept" if is_kept else "newly_rejected"
        both = verdict(past, "before") | verdict(row, "after")
        found.append(entry(row, change) | both | {"columns": " ".join(names)})
    gone = [
        entry(row, "removed") | verdict(row, "before")
        for key, row in old.items()
        if key not in seen
    ]
    return found + added + gone


CELLS = st.fixed_dictionaries(
    {
        "uri": st.sampled_from("abcdef"),
        "image_id": st.sampled_from("12"),
        "width": st.none() | st.integers(1, 3),
        "kept": st.sampled_from([True, False, None]),
        "reject_reason": st.none() | st.sampled_from(["entropy", "resolution"]),
        "reject_value": st.none() | st.sampled_from([0.0, 1.5]),
        "reject_threshold": st.none() | st.just(7.0),
        "caption_en": st.none() | st.sampled_from(["", "湖", "a lake"]),
        "license": st.none() | st.sampled_from(["CC0-1.0"]),
    }
)


@hypothesis.settings(max_examples=40)
@given(
    before=st.lists(CELLS, max_size=8, unique_by=lambda row: (row["uri"], row["image_id"])),
    after=st.lists(CELLS, max_size=8, unique_by=lambda row: (row["uri"], row["image_id"])),
    shared=st.lists(CELLS, max_size=4, unique_by=lambda row: (row["uri"], row["image_id"])),
)
def test_the_diff_equals_a_comparison_row_by_row(
    before: list[dict[str, object]], after: list[dict[str, object]], shared: list[dict[str, object]]
) -> None:
    tables = []
    for rows in (before, after):
        keys = {(row["uri"], row["image_id"]) for row in rows}
        rows = rows + [row for row in shared if (row["uri"], row["image_id"]) not in keys]
        table = pd.DataFrame(rows, columns=SCHEMA.names)
        tables.append(to_arrow(table, SCHEMA).to_pandas())
    found = diff(*tables)
    assert [
        {k: _value(v) for k, v in row.items()} for row in found.rows.to_dict("records")
    ] == row_by_row(*tables)
    per_column = Counter(
        name for row in row_by_row(*tables) for name in (row["columns"] or "").split()
    )
    assert found.by_column() == dict(sorted(per_column.items()))


def test_a_row_that_stands_twice_in_a_version_is_one_clear_error(params: Settings) -> None:
    table = corpus(params, 3)
    twice = pd.concat([table, table.iloc[[1]]], ignore_index=True)
    for versions, which in (((twice, table), "older"), ((table, twice), "newer")):
        told = rf"{which} version has photos/<1>\.jpg with the same bytes twice"
        with pytest.raises(ValueError, match=told):
            diff(*versions)


def test_rows_in_another_order_are_the_same_version(params: Settings) -> None:
    table = corpus(params, 3)
    assert diff(table.iloc[::-1].reset_index(drop=True), table).rows.empty
