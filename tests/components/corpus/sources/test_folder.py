from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from components.corpus.listing.source_files import source_folder
from components.corpus.listing.source_table import describe_source, read_listing
from components.corpus.manifest import SCHEMA, to_arrow
from components.corpus.sources.collect import collect
from components.corpus.sources.folder import file_name, manifest_of_folder, read_attribution
from components.engine.map_items import EngineLimits
from components.settings.corpus import IngestSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]
DOWNLOAD = load_settings(ROOT / "params.yaml").ingest.download.model_dump()


def settings(**changes: object) -> IngestSettings:
    values = {
        "kind": "folder",
        "download": DOWNLOAD,
        "source": "photos",
        "recursive": True,
        "extensions": (".jpg", ".png"),
        "attribution": None,
        "max_megapixels": 1.0,
    }
    return IngestSettings.model_validate(values | changes)


def scan_folder(settings: IngestSettings, root: Path) -> pd.DataFrame:
    """Through the table of the source, which lies outside: links in it are the test's."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "listing.parquet"
        limits = EngineLimits(workers=1, timeout_s=30.0, memory_mb=2048, retries=0)
        describe_source(settings, table, root=root, limits=limits)
        return manifest_of_folder(read_listing(table), settings, root)[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), "teal").save(folder / "b.jpg")
    Image.new("RGB", (30, 40), "navy").save(folder / "deep" / "a.PNG")
    (folder / "notes.txt").write_text("no photograph")
    return folder


def by_uri(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    return {row["uri"]: row for row in table.to_dict("records")}


def test_the_sample_is_listed_with_sizes_and_attribution() -> None:
    table = scan_folder(
        settings(source="data/sample", attribution="ATTRIBUTION.csv", max_megapixels=400.0), ROOT
    )
    rows = by_uri(table)
    assert len(rows) == 21
    row = rows["data/sample/vents-du-sud.jpg"]
    assert (row["width"], row["height"], row["format"]) == (4096, 2559, "JPEG")
    assert (row["photographer"], row["license"]) == ("Christian Ferrer", "CC-BY-4.0")
    assert row["source"] == "getsolus/artwork"
    assert row["image_id"] == hashlib.sha256((ROOT / str(row["uri"])).read_bytes()).hexdigest()
    assert set(table["integrity"]) == {"ok"}
    assert to_arrow(table, SCHEMA).num_rows == 21


def test_files_are_found_below_folders_in_sorted_order_by_ending(photos: Path) -> None:
    table = scan_folder(settings(), photos.parent)
    assert table["uri"].tolist() == ["photos/b.jpg", "photos/deep/a.PNG"]
    assert table["aspect_ratio"].tolist() == [40 / 30, 30 / 40]
    flat = scan_folder(settings(recursive=False), photos.parent)
    assert flat["uri"].tolist() == ["photos/b.jpg"]


def test_bad_files_are_rows_that_say_what_is_wrong(photos: Path) -> None:
    (photos / "empty.jpg").touch()
    (photos / "text.jpg").write_text("hello")
    Image.new("1", (2000, 2000)).save(photos / "bomb.png")
    (photos / "folder.jpg").mkdir()
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    rows = by_uri(scan_folder(settings(), photos.parent))
    assert rows["photos/empty.jpg"]["integrity"] == "empty file (0 bytes)"
    assert rows["photos/text.jpg"]["integrity"] == "not an image that PIL knows (text)"
    assert "4.0 megapixels, limit 1" in str(rows["photos/bomb.png"]["integrity"])
    assert rows["photos/gone.jpg"]["integrity"] == "cannot read: No such file or directory"
    assert "photos/folder.jpg" not in rows
    assert rows["photos/b.jpg"]["integrity"] == "ok"


def test_links_that_leave_the_folder_are_refused_and_inner_ones_are_duplicates(
    photos: Path,
) -> None:
    outside = photos.parent / "outside.jpg"
    shutil.copy(photos / "b.jpg", outside)
    (photos / "escape.jpg").symlink_to(outside)
    (photos / "inner.jpg").symlink_to(photos / "b.jpg")
    (photos / "linked").symlink_to(photos.parent)
    rows = by_uri(scan_folder(settings(), photos.parent))
    assert "leaves the source folder" in str(rows["photos/escape.jpg"]["integrity"])
    assert "leaves the source folder" in str(rows["photos/linked"]["integrity"])
    assert rows["photos/escape.jpg"]["image_id"] != rows["photos/b.jpg"]["image_id"]
    assert rows["photos/inner.jpg"]["duplicate_of"] == rows["photos/b.jpg"]["image_id"]
    assert len(rows) == 5


def test_the_first_of_identical_files_is_the_original(photos: Path) -> None:
    shutil.copy(photos / "b.jpg", photos / "a.jpg")
    rows = by_uri(scan_folder(settings(), photos.parent))
    assert pd.isna(rows["photos/a.jpg"]["duplicate_of"])
    assert rows["photos/b.jpg"]["duplicate_of"] == rows["photos/a.jpg"]["image_id"]


def test_a_source_outside_the_project_has_absolute_uris(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    table = scan_folder(settings(source=str(photos)), root)
    assert table["uri"][0] == (photos / "b.jpg").as_posix()
    assert file_name(table["uri"][1], photos, root) == "deep/a.PNG"


@pytest.mark.parametrize("make", ["missing", "empty", "file"])
def test_an_unusable_source_is_one_line_that_names_folder_and_setting(
    tmp_path: Path, make: str
) -> None:
    if make == "empty":
        (tmp_path / "photos").mkdir()
    if make == "file":
        (tmp_path / "photos").touch()
    with pytest.raises(ValueError, match=r"^photos: .*ingest\.source") as caught:
        scan_folder(settings(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_one_line(photos: Path) -> None:
    photos.chmod(0)
    try:
        with pytest.raises(ValueError, match=r"photos: no permission.*ingest\.source"):
            scan_folder(settings(), photos.parent)
    finally:
        photos.chmod(0o700)


def test_the_customary_attribution_file_may_be_missing(photos: Path) -> None:
    table = scan_folder(settings(attribution="ATTRIBUTION.csv"), photos.parent)
    assert len(table)
    assert table["photographer"].isna().all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("file,author\na.jpg,André\n".encode("latin-1"), "byte 0xE9 in line 2 is not UTF-8; save"),
        ("file,author\na.jpg,Ada\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("file,author\na.jpg,Ada\n".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (b"file;author\na.jpg;Ada\n", "separated by semicolons; save it with commas"),
        (b"file\tauthor\na.jpg\tAda\n", "separated by tabs; save it with commas"),
        (b"name,author\na.jpg,Ada\n", "needs a column 'file', has name, author$"),
        (b"", "needs a column 'file', has nothing$"),
    ],
)
def test_an_attribution_file_of_another_kind_says_what_it_is(
    photos: Path, data: bytes, said: str
) -> None:
    (photos / "who.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^who\.csv: .*{said}") as caught:
        read_attribution(photos / "who.csv")
    assert "\n" not in str(caught.value)
    (photos / "who.csv").write_bytes("\ufefffile,author\na.jpg,André\n".encode())
    assert read_attribution(photos / "who.csv") == {"a.jpg": {"photographer": "André"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "attribution file not found"),
        ("name,author\n", "needs a column 'file'"),
        ("file,author\nb.jpg,A\nb.jpg,B\n", "line 3: 'b.jpg' is listed twice"),
        ('file,author\nb.jpg,"A\na.jpg,B\n', "line 2: a quotation mark opens and does not close"),
        ('file,"author\nb.jpg,A\n', "line 1: a quotation mark opens and does not close"),
        ("file,author\nb.jpg,Doe, Ada\n", "line 2: 3 cells under 2 headings"),
        ("file,author,license\nb.jpg,Ada\n", "line 2: 2 cells under 3 headings"),
        (f"file,author\nb.jpg,{'A' * 200_000}\n", "line 2: more than 65536 characters under 'auth"),
        ("file,author\nb.jpg,A\0da\n", "line 2: a zero byte under 'author'"),
    ],
)
def test_a_broken_attribution_file_is_one_clear_error(
    photos: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (photos / "who.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        scan_folder(settings(attribution="who.csv"), photos.parent)


def test_cells_of_the_attribution_end_at_commas_and_line_ends_alone(photos: Path) -> None:
    strange = "A\x0bd\x0ca \x1cd\x1de\x1e \x85L\u2028o\u2029v"
    text = f'file,author,license\r\n\r\nb.jpg,{strange},"CC\r\nBY"\r\n,,\r\ndeep/a.PNG,Bob,\r\n'
    (photos / "who.csv").write_bytes(text.encode())
    assert read_attribution(photos / "who.csv") == {
        "b.jpg": {"photographer": strange, "license": "CC\r\nBY"},
        "deep/a.PNG": {"photographer": "Bob"},
    }


def test_rows_of_the_attribution_that_name_no_photograph_are_said(photos: Path) -> None:
    (photos / "who.csv").write_text("file,author\nb.jpg,A\na.PNG,B\nc.jpg,C\n")
    chosen = settings(attribution="who.csv")
    table, out = photos.parent / "listing.parquet", photos.parent / "out"
    limits = EngineLimits(workers=1, timeout_s=30.0, memory_mb=2048, retries=0)
    describe_source(chosen, table, root=photos.parent, limits=limits)
    root = photos.parent
    found = collect(chosen, out, root=root, state_dir=root, listing=table)
    assert found.remark == (
        "who.csv: 2 rows name no photograph of the source, such as 'a.PNG'; their licences are not "
        "seen by select.licenses"
    )
    assert json.loads((out / "coverage.json").read_text())["remark"] == found.remark


@pytest.mark.parametrize("source", [".", "..", "data", "linked"])
def test_the_project_itself_is_no_source(tmp_path: Path, source: str) -> None:
    root = tmp_path / "project"
    (root / "data" / "sample").mkdir(parents=True)
    (root / "linked").symlink_to(root)
    ingest = load_settings(ROOT / "params.yaml").ingest
    with pytest.raises(ValueError, match=f"^{source}: holds the project itself, whose own") as said:
        source_folder(ingest.model_copy(update={"source": source}), root)
    assert "\n" not in str(said.value)
    sample = source_folder(ingest.model_copy(update={"source": "data/sample"}), root)
    assert sample == root / "data" / "sample"


def test_the_original_holds_what_its_copies_are_credited_with(photos: Path) -> None:
    for name in ("c.jpg", "d.jpg"):
        shutil.copy(photos / "b.jpg", photos / name)
    (photos / "ATTRIBUTION.csv").write_text(
        "file,author,license,image_url\n"
        "c.jpg,Doe,CC-BY-NC-ND-4.0,http://x.org/c\nd.jpg,Eve,,\ndeep/a.PNG,Bo,CC0,\n"
    )
    table = scan_folder(settings(attribution="ATTRIBUTION.csv"), photos.parent)
    original, _, _, alone = table.to_dict("records")
    # Nothing is known of the original itself: it takes the first credit as a whole.
    assert (original["photographer"], original["license"]) == ("Doe", "CC-BY-NC-ND-4.0")
    assert json.loads(original["other_credits"]) == [{"photographer": "Eve"}]
    assert (alone["photographer"], alone["other_credits"]) == ("Bo", None)
    assert to_arrow(table, SCHEMA).num_rows == 4


def test_copies_of_thousands_of_photographs_take_no_longer_than_reading_them(
    photos: Path, tmp_path: Path
) -> None:
    few = settings(attribution="ATTRIBUTION.csv")
    (photos / "ATTRIBUTION.csv").write_text("file,author\n00000-0.jpg,Ann\n00000-1.jpg,Bo\n")
    one = tmp_path / "listing.parquet"
    describe_source(few, one, root=photos.parent, limits=EngineLimits(1, 30.0, 2048, 0))
    row = read_listing(one).iloc[:1]
    pairs = [f"{number:05d}" for number in range(2000)]
    listing = pd.concat([row] * 2 * len(pairs), ignore_index=True).assign(
        name=[f"{pair}-{copy}.jpg" for pair in pairs for copy in (0, 1)],
        sha256=[pair for pair in pairs for _ in (0, 1)],
    )
    begun = time.process_time()
    table, _ = manifest_of_folder(listing, few, photos.parent)
    assert time.process_time() - begun < 8.0
    assert json.loads(table.at[0, "other_credits"]) == [{"photographer": "Bo"}]
    assert table["other_credits"].notna().sum() == 1


def test_attribution_finds_a_photograph_by_any_spelling_of_its_name(photos: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD"))
    shutil.copy(photos / "b.jpg", photos / nfd)
    table = photos / "ATTRIBUTION.csv"
    table.write_text(f"file,author\n{nfc},Ann\n./b.jpg,Bo\ndeep\\a.PNG,Cy\n")
    found = scan_folder(settings(attribution="ATTRIBUTION.csv"), photos.parent)
    assert dict(zip(found["uri"], found["photographer"], strict=True)) == {
        "photos/b.jpg": "Bo",
        f"photos/{nfd}": "Ann",
        "photos/deep/a.PNG": "Cy",
    }
    table.write_text("file,author\n./b.jpg,Bo\nb.jpg,Cy\n")
    with pytest.raises(ValueError, match=r"^ATTRIBUTION\.csv: './b\.jpg' and 'b\.jpg' are one"):
        scan_folder(settings(attribution="ATTRIBUTION.csv"), photos.parent)
