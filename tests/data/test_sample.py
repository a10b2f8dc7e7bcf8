"""The bundled photographs, their attribution and their captions are complete and consistent."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from components.settings.schema import load_settings

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
PHOTOS = sorted(SAMPLE.glob("*.jpg"))
DOCUMENTS = {"ATTRIBUTION.csv", "README.md", "captions.jsonl"}

# The licences that let a photograph travel with the project when its attribution does.
ALLOWED_LICENCE = re.compile(r"Public Domain|CC0-1\.0|CC-BY-\d\.\d|CC-BY-SA-\d\.\d")
MIN_4K_PIXELS = 3840 * 2160
CJK = re.compile(r"[\u4e00-\u9fff]")
# A word keeps its hyphens and apostrophes: "wind-carved" is one word.
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


def _attribution() -> list[dict[str, str]]:
    with (SAMPLE / "ATTRIBUTION.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _captions() -> list[dict[str, str]]:
    text = (SAMPLE / "captions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _readme_rows() -> Iterator[tuple[str, int, int, float, float, str]]:
    """Rows of the README's table: file, width, height, flat fraction, entropy, verdict."""
    for line in (SAMPLE / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].endswith(".jpg"):
            width, height = (int(side) for side in cells[1].split("x"))
            yield cells[0], width, height, float(cells[3]), float(cells[4]), cells[5]


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_sample_holds_16_to_24_photographs_within_40_megabytes() -> None:
    assert 16 <= len(PHOTOS) <= 24
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 40_000_000


def test_sample_folder_holds_photographs_and_their_documents_only() -> None:
    found = {path.relative_to(SAMPLE).as_posix() for path in SAMPLE.rglob("*")}
    assert found == {path.name for path in PHOTOS} | DOCUMENTS


def test_no_two_photographs_have_the_same_bytes() -> None:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in PHOTOS]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photograph_decodes_to_at_least_one_megapixel(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "JPEG"
        image.load()
        assert image.mode == "RGB"
        assert image.width * image.height >= 1_000_000


def test_portrait_square_landscape_and_ultra_wide_are_all_present() -> None:
    ratios = [width / height for width, height in map(_size, PHOTOS)]
    assert any(ratio <= 0.8 for ratio in ratios), "no portrait"
    assert any(ratio == 1.0 for ratio in ratios), "no square"
    assert any(1.2 <= ratio < 2.2 for ratio in ratios), "no landscape"
    assert any(ratio >= 2.2 for ratio in ratios), "no ultra-wide"


def test_exactly_three_photographs_are_below_native_4k() -> None:
    small = {path.name for path in PHOTOS if _size(path)[0] * _size(path)[1] < MIN_4K_PIXELS}
    assert small == {"galen-crout-175291.jpg", "ng-32703.jpg", "spacex-81773.jpg"}


def test_every_photograph_has_one_attribution_with_an_author_and_an_allowed_licence() -> None:
    rows = _attribution()
    assert [row["file"] for row in rows] == [path.name for path in PHOTOS]
    for row in rows:
        assert ALLOWED_LICENCE.fullmatch(row["license"]), row
        assert row["author"], row
        assert row["repository"], row


def test_every_photograph_has_exactly_one_caption_in_both_languages() -> None:
    rows = _captions()
    assert [row["file"] for row in rows] == [path.name for path in PHOTOS]
    for language in ("caption_en", "caption_zh"):
        assert len({row[language] for row in rows}) == len(rows)


def test_caption_lines_are_plain_utf8_with_the_keys_in_order() -> None:
    raw = (SAMPLE / "captions.jsonl").read_text(encoding="utf-8")
    assert raw.endswith("\n")
    for line, row in zip(raw.splitlines(), _captions(), strict=True):
        assert list(row) == ["file", "caption_en", "caption_zh"]
        assert line == json.dumps(row, ensure_ascii=False)
        assert all(value == value.strip() for value in row.values())
        assert "  " not in row["caption_en"]


@pytest.mark.parametrize("row", _captions(), ids=lambda row: Path(row["file"]).stem)
def test_english_caption_has_60_to_130_words(row: dict[str, str]) -> None:
    caption = row["caption_en"]
    assert 60 <= len(WORD.findall(caption)) <= 130
    assert caption.isascii()
    assert not re.match(r"(this|the) (image|photo|picture|photograph)\b", caption, re.IGNORECASE)


@pytest.mark.parametrize("row", _captions(), ids=lambda row: Path(row["file"]).stem)
def test_chinese_caption_is_mostly_cjk_characters(row: dict[str, str]) -> None:
    caption = row["caption_zh"]
    ideographs = len(CJK.findall(caption))
    assert 100 <= ideographs <= 220
    # The rest is punctuation and, in two captions, lettering quoted from the picture.
    assert ideographs / len(caption) >= 0.8
    assert caption.endswith("\u3002")


def test_people_are_marked_in_every_photograph_and_boxes_lie_inside() -> None:
    path = SAMPLE.parent / "scores" / "sample_people.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [photo.name for photo in PHOTOS]
    for row, photo in zip(rows, PHOTOS, strict=True):
        assert row["image_id"] == hashlib.sha256(photo.read_bytes()).hexdigest()
        boxes = json.loads(row["person_boxes"])
        assert (len(boxes), row["person_scorer"]) == (int(row["person_count"]), "hand")
        width, height = _size(photo)
        for box in boxes:
            top, left, bottom, right = box["box"]
            assert box["label"] == "person"
            assert 0 <= top < bottom <= height
            assert 0 <= left < right <= width
    assert sum(int(row["person_count"]) for row in rows) == 7


def test_queries_of_the_human_channel_are_those_of_the_default_profile() -> None:
    """Retrieved: with people and kept, with people and rejected, without people and kept."""
    queries = {row["file"]: row["query"] for row in _attribution() if row["query"]}
    assert set(queries) == {
        "mount-batok-java.jpg",
        "exhibicion-freestyle-gp.jpg",
        "boats-on-the-river.jpg",
    }
    people = load_settings(SAMPLE.parents[1] / "params.yaml").people
    assert sorted(people.human_queries) == sorted(queries.values())


def test_readme_states_the_number_and_the_total_size_of_the_photographs() -> None:
    total_bytes = sum(path.stat().st_size for path in PHOTOS)
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert f"{len(PHOTOS)} pictures, {total_bytes:,} bytes" in readme


def test_readme_table_states_the_true_sizes_and_the_verdicts_that_follow() -> None:
    rows = list(_readme_rows())
    assert [row[0] for row in rows] == [path.name for path in PHOTOS]
    for name, width, height, flat_fraction, entropy_bits, verdict in rows:
        assert (width, height) == _size(SAMPLE / name)
        failed = [
            rule
            for rule, fails in (
                ("resolution", width * height < MIN_4K_PIXELS),
                ("flat", flat_fraction > 0.5),
                ("entropy", entropy_bits < 7.0),
            )
            if fails
        ]
        assert verdict == (f"rejected: {', '.join(failed)}" if failed else "kept")
