from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.corpus.manifest import SCHEMA, SCHEMA_VERSION, read_table, write_table
from components.corpus.manifest_columns import read_columns

ROWS = pd.DataFrame(
    {
        "uri": ["a.jpg", "b.jpg"],
        "image_id": ["0" * 64, "1" * 64],
        "width": [4096, None],
        "kept": pd.Series([True, None], dtype=object),
        "caption_zh": ["水", None],
    }
)


def test_a_manifest_survives_the_round_trip_with_every_column(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path / "m.parquet")
    table = read_table(tmp_path / "m.parquet")
    assert list(table.columns) == SCHEMA.names
    assert table["width"].tolist()[0] == 4096
    assert pd.isna(table["width"][1])
    assert table["kept"].tolist() == [True, None]
    assert table["caption_zh"][0] == "水"
    assert table["license"].isna().all()


def test_equal_tables_give_equal_bytes_whatever_the_column_order(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path / "a.parquet")
    write_table(ROWS[ROWS.columns[::-1]], tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_what_was_read_can_be_written_again_unchanged(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path / "a.parquet")
    write_table(read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_schema_version_is_stored_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(ROWS, path)
    metadata = pq.read_schema(path).metadata
    assert metadata[b"ultraflux.manifest.schema_version"] == str(SCHEMA_VERSION).encode()
    for version in (b"999", b"x"):
        other = pq.read_table(path).replace_schema_metadata(
            {b"ultraflux.manifest.schema_version": version}
        )
        pq.write_table(other, path)
        with pytest.raises(ValueError, match=f"schema version {version.decode()}, this code reads"):
            read_table(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="not a manifest"):
        read_table(path)


NEW_IN_4 = (
    *("stored_width", "stored_height", "orientation", "color_space", "bit_depth", "has_alpha"),
    *("decode_note", "alpha_fraction", "drawing_score"),
)


def test_a_manifest_of_version_three_is_read_with_the_new_columns_null(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(ROWS, path)
    old = pq.read_table(path).drop_columns(list(NEW_IN_4))
    old = old.replace_schema_metadata({b"ultraflux.manifest.schema_version": b"3"})
    pq.write_table(old, path)
    table = read_table(path)
    assert list(table.columns) == SCHEMA.names
    assert table[list(NEW_IN_4)].isna().all(axis=None)
    assert table["uri"].tolist() == ["a.jpg", "b.jpg"]
    part = read_table(path, ["orientation", "uri", "has_alpha", "nothing"])
    assert list(part.columns) == ["orientation", "uri", "has_alpha"]
    # And what was read can be written in today's version.
    write_table(table, tmp_path / "new.parquet")
    assert read_table(tmp_path / "new.parquet")["orientation"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": ["red", "blue"]}, r"columns \['colour'\]"),
        ({"width": ["wide", "narrow"]}, "column width"),
        ({"width": [1.5, 2.0]}, "column width"),
        ({"image_id": ["0" * 64, None]}, "column image_id: 1 values are missing"),
    ],
)
def test_a_wrong_column_is_one_clear_error(
    tmp_path: Path, change: dict[str, list[object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_table(ROWS.assign(**change), tmp_path / "m.parquet")
    assert not list(tmp_path.iterdir())


def test_what_others_wrote_into_a_column_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(ROWS, path)
    table = pq.read_table(path)
    for name, values, message in (
        ("entropy_bits", ["high", "low"], "column entropy_bits must be numbers, not text"),
        ("kept", [1, 0], "column kept must be bool, not numbers"),
        ("caption_en", [7, 8], "column caption_en must be text, not numbers"),
        ("image_id", pa.nulls(2, pa.string()), "column image_id: 2 values are missing"),
    ):
        place = table.schema.get_field_index(name)
        other = table.set_column(place, name, pa.array(values))
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
        for read in (read_table, read_columns):
            with pytest.raises(ValueError, match=rf"m\.parquet: {message}"):
                read(path, [name])
