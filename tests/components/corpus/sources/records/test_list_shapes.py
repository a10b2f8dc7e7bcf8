"""Lists that would be misread are refused in one line that says what to set, and then read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from components.corpus.sources.multiaspect import read_metadata_shards
from components.corpus.sources.records.ledger import Ledger, balanced
from components.corpus.sources.records.text_lines import foreign_encoding
from components.corpus.sources.url_lists import read_url_lists
from components.settings.corpus import ListSettings

TABLE = "url,caption\nhttp://a/1.jpg,Café\nhttp://a/2.jpg,x\n"
RECORDS = [
    {"url": "http://a/1.jpg", "caption": "Café"},
    {"url": "http://a/2.jpg", "caption": "x"},
]


def read(path: Path, **lists: object) -> list[dict[str, Any] | None]:
    items = read_url_lists(path, path.name, ListSettings.model_validate(lists))
    return [record.values for record in balanced(items, Ledger())]


MISREAD: dict[str, tuple[str, bytes, str, dict[str, Any]]] = {
    "no heading": (
        "a.csv",
        TABLE.partition("\n")[2].encode(),
        r"no column of addresses; columns are http://a/1\.jpg, Café; .*ingest\.lists\.columns .*"
        r"\[url, column_2\]",
        {"columns": ["url", "caption"]},
    ),
    "no heading, bars": (
        "a.csv",
        TABLE.partition("\n")[2].replace(",", "|").encode(),
        r"no column of addresses; .*\[url, column_2\] and ingest\.lists\.separator to \"\|\"",
        {"columns": ["url", "caption"], "separator": "|"},
    ),
    "semicolons": (
        "a.csv",
        TABLE.replace(",", ";").encode(),
        r"no column of addresses; columns are url;caption; .*semicolons.*"
        r"ingest\.lists\.separator to \";\"",
        {"separator": ";"},
    ),
    "tabs": (
        "a.csv",
        TABLE.replace(",", "\t").encode(),
        r"ingest\.lists\.separator to \"\\t\"",
        {"separator": "\t"},
    ),
    "bars": (
        "a.csv",
        TABLE.replace(",", "|").encode(),
        r"ingest\.lists\.separator to \"\|\"",
        {"separator": "|"},
    ),
    "commas in tsv": ("a.tsv", TABLE.encode(), r"to \",\"", {"separator": ","}),
    "latin-1": (
        "a.csv",
        TABLE.encode("latin-1"),
        r"byte 0xE9 in line 2 is not UTF-8; set ingest\.lists\.encoding .*cp1252",
        {"encoding": "cp1252"},
    ),
    "latin-1, gzipped": (
        "a.csv.gz",
        gzip.compress(TABLE.encode("latin-1"), mtime=0),
        r"ingest\.lists\.encoding",
        {"encoding": "latin-1"},
    ),
    "latin-1 json": (
        "a.jsonl",
        '{"url": "http://a/1.jpg", "caption": "Café"}\n{"url": "http://a/2.jpg", "caption": "x"}\n'
        "".encode("latin-1"),
        r"byte 0xE9 in line 1",
        {"encoding": "latin-1"},
    ),
    "utf-16 without a mark": (
        "a.csv",
        TABLE.encode("utf-16-be"),
        r"ingest\.lists\.encoding to utf-16-be",
        {"encoding": "utf-16-be"},
    ),
}


@pytest.mark.parametrize("kind", MISREAD)
def test_what_the_refusal_says_makes_the_list_readable(tmp_path: Path, kind: str) -> None:
    name, data, message, setting = MISREAD[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert read(tmp_path / name, **setting) == RECORDS


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_addresses_under_a_name_of_their_own_are_found_when_it_is_set(
    tmp_path: Path, ending: str
) -> None:
    table = pd.DataFrame({"Foto": ["http://a/1.jpg"], "image_url": ["thumb"], "n": ["x"]})
    path = tmp_path / f"list.{ending}"
    write = {
        "csv": lambda t: t.to_csv(path, index=False),
        "jsonl": lambda t: t.to_json(path, orient="records", lines=True),
        "parquet": lambda t: t.to_parquet(path, index=False),
    }[ending]
    write(table)
    expected = [{"image_url": "http://a/1.jpg", "image_url.2": "thumb", "n": "x"}]
    assert read(path, url_column="foto") == expected
    what = "field" if ending == "jsonl" else "column"
    with pytest.raises(
        ValueError, match=rf"no {what} of addresses called pic; {what}s are Foto, image_url, n; set"
    ):
        read(path, url_column="pic")
    write(table.drop(columns="image_url"))
    with pytest.raises(
        ValueError, match=rf"no {what} of addresses; {what}s are Foto, n; set ingest\.lists\.url_"
    ):
        read(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"PK\x03\x04...", "not text but a ZIP archive or workbook"),
        ("a.csv", gzip.compress(b"url\n", mtime=0), "not text but gzipped"),
        ("a.csv", b'url,"caption\nhttp://a/1.jpg,x\n', "the quotation mark in its heading"),
        ("a.csv", b"\xef\xbb\xbf\n<!DOCTYPE html>\n<p>", "not text but a web page or XML"),
        ("a.csv", b"# mine\n\n# too\nurl,x\nhttp://a/1.jpg,y\n", "below 2 other lines: remove"),
        ("a.csv", b"foto,text\nx,http://a/1.jpg\n", r"set ingest\.lists\.url_column to text$"),
        ("a.jsonl", b'[{"url": "http://a/1.jpg"},\n{"url": "http://a/2.jpg"}]\n', "JSON array"),
        ("a.jsonl", b'[{"url": "http://a/1.jpg"}]\n', "kind to multiaspect"),
    ],
)
def test_other_files_that_are_no_list_are_named(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
        read(tmp_path / name)


def test_of_a_folder_the_first_misread_list_is_named_before_any_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "b.csv").write_text(TABLE.replace(",", ";"))
    (tmp_path / "c.csv").write_text("http://a/1.jpg\n")
    with pytest.raises(ValueError, match=r"^lists/b\.csv: .*\(and 1 more lists\)$"):
        read_url_lists(tmp_path, "lists", ListSettings())


def test_a_few_zero_bytes_are_damage_and_half_of_them_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"url": f"http://a/{n}.jpg"}) for n in range(6)]
    path.write_text("\n".join([*lines[:3], "\0" * 20, *lines[3:]]))
    assert foreign_encoding(path) is None
    assert [record is not None for record in read(path)] == [True] * 3 + [False] + [True] * 3
    path.write_bytes("\n".join(lines).encode("utf-16-be"))
    assert str(foreign_encoding(path)).endswith("set ingest.lists.encoding to utf-16-be")
    # Chinese captions have no zero bytes, but all around them does.
    wide = [json.dumps({"url": "http://a/1.jpg", "caption": "湖" * 40}, ensure_ascii=False)] * 9
    path.write_bytes("\n".join(wide).encode("utf-16-le"))
    assert str(foreign_encoding(path)).endswith("set ingest.lists.encoding to utf-16-le")


def test_one_wrong_byte_in_a_utf8_list_is_damage_and_costs_its_character(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(TABLE.encode() + b"http://a/3.jpg,caf\xe9\n")
    assert foreign_encoding(path) is None
    assert read(path) == [*RECORDS, {"url": "http://a/3.jpg", "caption": "caf\ufffd"}]
    # Set by hand, UTF-8 is taken at its word.
    path.write_bytes(TABLE.encode("latin-1"))
    assert read(path, encoding="utf-8") == [{**RECORDS[0], "caption": "Caf\ufffd"}, RECORDS[1]]


def test_a_letter_far_into_the_file_is_found_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [b"url,caption", *(b"http://a/%d.jpg,plain" % n for n in range(100_000))]
    lines[90_000] += b" caf\xe9"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match="0xE9 in line 90001 "):
        read(path)


def test_unknown_encodings_and_separators_are_refused_with_the_settings() -> None:
    for wrong in (
        {"encoding": "klingon"},
        {"encoding": "base64"},
        {"encoding": "idna"},
        {"separator": '"'},
    ):
        with pytest.raises(ValueError, match=r"try utf-8|try , ;"):
            ListSettings.model_validate(wrong)


def test_an_encoding_that_a_file_cannot_be_in_is_named_with_the_setting(tmp_path: Path) -> None:
    wrong = ListSettings(encoding="utf-16")
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "0.json").write_text(json.dumps(RECORDS))
    message = r": is no text in utf-16 \(.*\); set ingest\.lists\.encoding to .*utf-8"
    with pytest.raises(ValueError, match=r"^in/a\.csv" + message):
        read_url_lists(tmp_path, "in", wrong)
    with pytest.raises(ValueError, match=r"^in/0\.json" + message):
        read_metadata_shards(tmp_path, "in", wrong)
    # A mark in the file decides.
    (tmp_path / "a.csv").write_text(TABLE, encoding="utf-16")
    assert read(tmp_path / "a.csv", encoding="utf-16") == RECORDS
