from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components.corpus.captions.caption_files import read_captions
from components.corpus.captions.checks import (
    Caption,
    Judged,
    check_chinese,
    judge_provided,
)
from components.corpus.captions.joining import join_captions
from components.corpus.captions.provided import provided_captions
from components.settings.captions import CaptionSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]
SETTINGS = CaptionSettings.model_validate(
    {
        "provider": "shipped",
        "text": None,
        "local": None,
        "provided": "keep",
        "file": "captions.jsonl",
        "min_words": 3,
        "max_words": 6,
        "prompt_version": "detailed-1",
        "prompt_file": None,
        "max_cost_usd": 0.0,
        "endpoint": None,
        "translate": {
            "provider": "shipped",
            "prompt_version": "simplified-chinese-1",
            "prompt_file": None,
            "endpoint": None,
        },
    }
)
LONG = "a calm lake below red hills"


@pytest.mark.parametrize(
    ("caption", "status"),
    [
        (Caption("  \n", "湖"), "missing"),
        (Caption(LONG, None), "ok"),
        (Caption(LONG, "  "), "ok"),
        (Caption(LONG, "红色山丘下的湖"), "ok"),
        (Caption("a calm lake", None), "ok"),
        (Caption("calm lake", None), "too_short"),
        (Caption(LONG + " today", None), "too_long"),
        (Caption("红色 山丘 下的湖", None), "wrong_language"),
        (Caption("красные холмы над озером", None), "wrong_language"),
        (Caption("1 2 3 4", None), "wrong_language"),
        (Caption(LONG, "a lake"), "wrong_language"),
        (Caption("une vieille barque rouge sur le sable", None), "wrong_language"),
        (Caption(LONG, "紅色山丘下平靜的湖"), "wrong_language"),
        (Caption("a <b>calm</b> lake", None), "markup"),
        (Caption(LONG, "红色山丘下<br>的湖"), "markup"),
        (Caption("a caf\ufffd by the lake", None), "unreadable"),
        (Caption("a calm lake below the", None), "truncated"),
        (Caption(LONG, "红色山丘下的湖，"), "truncated"),
        (Caption("the red hill by " * 3, None), "repetitive"),
        (Caption("I’m sorry, I cannot see it", None), "refusal"),
        (Caption(LONG, "抱歉，我无法描述"), "refusal"),
        (Caption("a red café named 湖 Orléans", None), "ok"),
    ],
)
def test_captions_are_judged(caption: Caption, status: str) -> None:
    assert judge_provided(caption, SETTINGS, "provided: x").status == status


def test_every_shipped_caption_is_usable() -> None:
    sample = ROOT / "data" / "sample"
    files = {path.name for path in sample.glob("*.jpg")}
    captions, losses = read_captions(sample / "captions.jsonl", files)
    assert losses == []
    shipped = SETTINGS.model_copy(update={"min_words": 60, "max_words": 130})
    assert set(captions) == files
    assert {judge_provided(c, shipped, "provided: x").status for c in captions.values()} == {"ok"}


def test_only_kept_rows_are_rejected_for_their_caption() -> None:
    table = pd.DataFrame(
        {
            "kept": [True, True, True, False],
            "reject_reason": pd.Series([None, None, None, "entropy"], dtype=object),
            "reject_value": [None, None, None, 5.0],
            "reject_threshold": [None, None, None, 7.0],
        }
    )
    captions = [
        Caption(LONG, "湖"),
        Caption("calm lake", None),
        Caption("", None),
        Caption("", None),
    ]
    judged = [judge_provided(c, SETTINGS, "provided: captions.jsonl") for c in captions]
    result = join_captions(table, judged, SETTINGS)
    assert result["kept"].tolist() == [True, False, False, False]
    assert result["caption_status"].tolist() == ["ok", "too_short", "missing", "missing"]
    assert result["reject_reason"].tolist()[1:] == ["caption", "caption", "entropy"]
    assert result["reject_value"].tolist()[1] == 2.0
    assert result["reject_threshold"].tolist()[1] == 3.0
    assert pd.isna(result["reject_value"][2])
    assert (result["reject_value"][3], result["reject_threshold"][3]) == (5.0, 7.0)
    assert table["kept"].tolist() == [True, True, True, False]
    assert result["caption_model"].tolist()[:2] == ["provided: captions.jsonl"] * 2
    assert result["translation_model"].notna().tolist() == [True, False, False, False]


def test_a_translation_of_wrong_length_is_not_measured_in_english_words() -> None:
    table = pd.DataFrame(
        {"kept": [True], "reject_reason": None, "reject_value": None, "reject_threshold": None}
    )
    judged = Judged(LONG, "湖", "too_short", "m", "t", words=6, failed_english=False)
    result = join_captions(table, [judged], SETTINGS)
    assert result["reject_reason"].tolist() == ["caption"]
    assert result["reject_value"].isna().all()
    assert result["reject_threshold"].isna().all()


@pytest.mark.parametrize(
    ("chinese", "status"),
    [
        ("红色山丘下平静的湖", "ok"),
        (" ", "missing"),
        ("抱歉，我无法翻译", "refusal"),
        ("作为一个人工智能，我……", "refusal"),
        ("作为画面中心的湖十分平静", "ok"),
        ("a calm lake below red hills", "wrong_language"),
        ("湖", "too_short"),
        ("红绿蓝白黑山丘湖水" * 5, "repetitive"),
        ("".join(chr(0x4E00 + n) for n in range(40)), "too_long"),
    ],
)
def test_translations_are_judged_by_script_and_by_length_against_the_english(
    chinese: str, status: str
) -> None:
    assert check_chinese(chinese, LONG) == status


INGEST = load_settings(ROOT / "params.yaml").ingest


def manifest(*captions: tuple[str | None, str | None]) -> pd.DataFrame:
    english, chinese = zip(*captions, strict=True)
    files = [f"photos/{n}.jpg" for n in range(len(captions))]
    return pd.DataFrame({"uri": files, "kept": True, "caption_en": english, "caption_zh": chinese})


@pytest.mark.parametrize("kind", ["urls", "webdataset", "multiaspect"])
def test_captions_of_records_are_checked_and_named_by_what_brought_them(
    tmp_path: Path, kind: str
) -> None:
    ingest = INGEST.model_copy(update={"kind": kind, "source": "list.csv"})
    table = manifest(
        (LONG, "红色山丘下的湖"), (LONG, None), (None, "湖"), ("lake", None), (None, None)
    )
    rows = provided_captions(table["uri"], {}, ingest, SETTINGS, tmp_path).of(table)
    assert [row.status for row in rows] == ["ok", "ok", "missing", "too_short", "missing"]
    assert (rows[0].english, rows[0].chinese) == (LONG, "红色山丘下的湖")
    assert {row.caption_model for row in rows[:2]} == {rows[0].caption_model}
    assert str(rows[0].caption_model).startswith("provided: ")
    assert rows[4] == Judged(None, None, "missing", None, None)
    ignoring = SETTINGS.model_copy(update={"provided": "ignore"})
    none = provided_captions(table["uri"], {}, ingest, ignoring, tmp_path).of(table)
    assert {row.status for row in none} == {"missing"}


def test_what_came_with_a_rejected_photograph_stays_and_is_not_checked(tmp_path: Path) -> None:
    ingest = INGEST.model_copy(update={"kind": "urls", "source": "list.csv"})
    table = manifest(("lake", "湖"), (None, None)).assign(kept=False)
    rows = provided_captions(table["uri"], {}, ingest, SETTINGS, tmp_path).of(table)
    assert (rows[0].english, rows[0].chinese, rows[0].status) == ("lake", "湖", None)
    assert rows[1].status == "missing"
