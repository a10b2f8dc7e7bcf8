from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components.corpus.manifest import write_table
from components.corpus.selection.rules import REASONS, judgements, select
from components.corpus.selection.why import ImageUnknown, explain, find, with_later_stages
from components.settings.schema import Settings, load_settings

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def params() -> Settings:
    return load_settings(ROOT / "params.yaml")


def candidates(*changes: dict[str, object]) -> pd.DataFrame:
    good: dict[str, object] = {
        "integrity": "ok",
        "duplicate_of": None,
        "width": 4000,
        "height": 3000,
        "flat_fraction": 0.25,
        "entropy_bits": 7.5,
        "quality_score": 0.5,
        "aesthetic": 0.5,
        "channel": "general",
        "pdq_hash": None,
        "pdq_quality": 100,
    }
    named = [
        {"image_id": f"{n:04x}" * 16, "uri": f"photos/{n}/lake-{n}.jpg"} | good | change
        for n, change in enumerate(changes)
    ]
    return pd.DataFrame(named)


def test_every_rule_says_its_value_also_after_the_first_that_fails(params: Settings) -> None:
    rejected = {"width": 400, "flat_fraction": 0.75, "entropy_bits": None}
    table = select(candidates(rejected, {}), params.select)
    lines = explain(table, 0, params).lines()
    assert lines[0] == "photos/0/lake-0.jpg (000000000000): dropped by resolution"
    text = "\n".join(lines)
    assert "FAILS     resolution: 1,200,000, must be >= 8,294,400 (select.min_pixels)" in text
    assert "fails too flat_fraction: 0.75, must be <= 0.5" in text
    assert "fails too entropy: not measured" in text
    assert "near_duplicate: not looked at" not in text
    kept = explain(table, 1, params).lines()
    assert kept[0].endswith(": kept")
    assert not [line for line in kept if "FAILS" in line or "fails" in line]
    assert "ok        entropy: 7.5, must be >= 7" in "\n".join(kept)


def test_a_name_writes_no_lines_and_moves_no_cursor(params: Settings) -> None:
    table = select(candidates({"uri": "a\x1b[2J\nerror: b.jpg"}), params.select)
    assert explain(table, 0, params).lines()[0].startswith(r"a\x1b[2J\nerror: b.jpg (0000")


def test_the_reason_is_that_of_the_selection_for_every_row(params: Settings) -> None:
    rules = params.select.model_copy(update={"aesthetic_top_fraction": 0.5, "target_images": 2})
    changed = params.model_copy(update={"select": rules})
    channel = {"channel": "human"}
    table = candidates(
        *({"aesthetic": n / 10} for n in range(6)),
        {"integrity": "empty file"},
        {"duplicate_of": "0" * 64},
        {"entropy_bits": 6.5} | channel,
        channel | {"aesthetic": 0.9},
    )
    selected = select(table, rules, params.project.seed)
    for row, reason in enumerate(selected["reject_reason"]):
        seen, result = judgements(table, rules, params.project.seed, row)
        pd.testing.assert_frame_equal(result, selected)
        first = [rule.rule for rule in seen if rule.fails and rule.reached]
        assert first[:1] == ([] if pd.isna(reason) else [reason])
        why = explain(selected, row, changed)
        assert why.kept == pd.isna(reason)
        failed = [rule for rule in why.rules if rule.fails]
        assert bool(failed) == (not why.kept)
        assert {rule.rule for rule in why.rules} | set(why.off) <= set(REASONS)
        if not why.kept:
            assert failed[0].threshold == selected["reject_threshold"][row] or pd.isna(
                selected["reject_threshold"][row]
            )
    assert "empty file" in "\n".join(explain(selected, 6, changed).lines())


def test_a_near_duplicate_names_its_keeper_and_the_keeper_those_it_stands_for(
    params: Settings,
) -> None:
    table = candidates(
        {"pdq_hash": "0" * 64, "width": 5000}, {"pdq_hash": "0" * 63 + "7"}, {"pdq_hash": "f" * 64}
    )
    table = select(table, params.select)
    dropped = "\n".join(explain(table, 1, params).lines())
    assert "FAILS     near_duplicate: 3 of 256 bits from a better one, limit 31" in dropped
    assert "kept in its place: photos/0/lake-0.jpg (000000000000)" in dropped
    assert "stands for 1 dropped duplicates: photos/1/lake-1.jpg" in "\n".join(
        explain(table, 0, params).lines()
    )


def test_a_change_of_settings_since_the_stage_is_said(params: Settings) -> None:
    table = select(candidates({"entropy_bits": 6.8}), params.select)
    rules = params.select.model_copy(update={"min_entropy_bits": 6.5})
    why = explain(table, 0, params.model_copy(update={"select": rules}))
    assert why.kept
    assert "settings have changed: the stage select said entropy" in why.lines()[-1]


def test_the_verdict_is_that_of_the_last_stage(params: Settings, tmp_path: Path) -> None:
    selected = select(candidates({}, {}, {"width": 400}), params.select)
    later = selected.assign(
        caption_status=["missing", "ok", "missing"],
        kept=[False, True, False],
        reject_reason=["caption", None, "resolution"],
    )
    verdicts = []
    for stage in (None, "caption", "slices"):
        if stage is not None:
            (tmp_path / stage).mkdir()
            split = [None, "train", None] if stage == "slices" else None
            write_table(later.assign(split=split), tmp_path / stage / "manifest.parquet")
        found = [with_later_stages(explain(selected, n, params), tmp_path) for n in range(3)]
        verdicts.append([why.lines()[0].partition(": ")[2] for why in found])
    assert verdicts[0] == ["kept", "kept", "dropped by resolution"]
    assert verdicts[1] == verdicts[2] == ["dropped by caption (missing)", *verdicts[0][1:]]
    assert found[0].lines()[-1] == "  caption: caption_status missing"
    assert found[1].lines()[-2:] == ["  caption: caption_status ok", "  slices: split train"]


def test_an_image_is_found_by_id_prefix_path_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = candidates({}, {}, {}, {"uri": "photos/9/lake-2.jpg"})
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    for name in ("0001" * 16, "00010001", "photos/1/lake-1.jpg", "lake-1.jpg", "1/lake-1.jpg"):
        assert find(table, name, tmp_path) == 1
    assert find(table, str(tmp_path / "photos/1/lake-1.jpg"), tmp_path) == 1
    with pytest.raises(ImageUnknown, match=r"2 candidates go by it \(photos/2/lake-2.jpg"):
        find(table, "lake-2.jpg", tmp_path)
    for unknown in ("lake", "ake-1.jpg", "abcd", "", "00"):
        with pytest.raises(ImageUnknown, match="no candidate has this"):
            find(table, unknown, tmp_path)
    for wrong, meant in (
        ("Lake1.JPG", "did you mean photos/1/lake-1.jpg, photos/"),
        ("lake-3", "did you mean photos/"),
        ("-0.jp", "did you mean photos/0/lake-0.jpg?"),
        ("harbour", "there are 4: photos/0/lake-0.jpg, photos/1/lake-1.jpg, "),
    ):
        with pytest.raises(ImageUnknown) as caught:
            find(table, wrong, tmp_path)
        assert f"file name or address; {meant}" in str(caught.value)
    with pytest.raises(ImageUnknown, match=r"file name or address; there are 0$"):
        find(table.head(0), "lake-1.jpg", tmp_path)


def test_an_id_means_the_original_and_a_path_the_copy(tmp_path: Path) -> None:
    same = {"image_id": "ab" * 32}
    table = candidates(same | {"duplicate_of": "ab" * 32}, same)
    assert find(table, "abab", tmp_path) == 1
    assert find(table, "photos/0/lake-0.jpg", tmp_path) == 0
