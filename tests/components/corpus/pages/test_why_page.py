from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.corpus.pages.why_page import write_why
from components.corpus.selection.why import Why

RED, BLUE = "aa" * 32, "bb" * 32


def verdict(**changes: object) -> Why:
    values = {
        "image_id": RED,
        "uri": "photos/<red>.jpg",
        "integrity": "ok",
        "kept": False,
        "reason": "near_duplicate",
        "rules": (),
        "off": (),
        "keeper": (BLUE, "photos/blé.jpg"),
        "keeps_for": (),
        "stored_reason": "near_duplicate",
    }
    return Why(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def derivatives(tmp_path: Path) -> Path:
    def jpeg(colour: str, size: tuple[int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, "JPEG")
        return buffer.getvalue()

    path = tmp_path / "derivatives.parquet"
    jpegs = [jpeg("red", (64, 40)), jpeg("blue", (32, 48)), None]
    ids = [RED, BLUE, "cc" * 32]
    pq.write_table(pa.table({"image_id": ids, "jpeg": pa.array(jpegs, pa.binary())}), path)
    return path


def test_the_two_pictures_stand_side_by_side(derivatives: Path, tmp_path: Path) -> None:
    write_why(verdict(), derivatives, tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as page:
        assert page.width == 64 + 8 + 32
        left, right = page.getpixel((32, 40)), page.getpixel((64 + 8 + 16, 40))
    assert left[0] > 240 > 20 > left[2]  # type: ignore[index]
    assert right[2] > 240 > 20 > right[0]  # type: ignore[index]


@pytest.mark.parametrize("name", ["why.png", "why.html"])
def test_a_link_that_is_named_stays_one(derivatives: Path, tmp_path: Path, name: str) -> None:
    link = tmp_path / name
    link.symlink_to(tmp_path / f"real-{name}")
    write_why(verdict(), derivatives, link)
    assert link.is_symlink()
    assert (tmp_path / f"real-{name}").is_file()


def test_the_page_holds_both_pictures_and_escapes_names(derivatives: Path, tmp_path: Path) -> None:
    write_why(verdict(), derivatives, tmp_path / "why.html")
    text = (tmp_path / "why.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2
    assert "photos/&lt;red&gt;.jpg" in text
    assert "<red>" not in text
    write_why(verdict(image_id="cc" * 32, keeper=None), derivatives, tmp_path / "none.html")
    assert "could not be decoded" in (tmp_path / "none.html").read_text()


def test_what_cannot_be_written_is_one_line(derivatives: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.html or \.png"):
        write_why(verdict(), derivatives, tmp_path / "why.jpg")
    with pytest.raises(ValueError, match="no derivative to show"):
        write_why(verdict(keeper=None), tmp_path / "missing.parquet", tmp_path / "why.png")


def test_only_the_row_groups_of_the_two_pictures_are_read(
    derivatives: Path, tmp_path: Path
) -> None:
    table = pq.read_table(derivatives)
    path = tmp_path / "in groups.parquet"
    other = table.slice(1, 1).set_column(0, "image_id", pa.array(["dd" * 32]))
    pq.write_table(pa.concat_tables([other, table]), path, row_group_size=1, compression="none")
    # A million pictures are a hundred gigabytes; here reading the first would fail.
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"."):
        pq.read_table(path)
    write_why(verdict(), path, tmp_path / "why.html")
    assert (tmp_path / "why.html").read_text().count("data:image/jpeg;base64,") == 2
