"""Readers of untrusted lists and shards: every record is there, or is a loss with a cause."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.corpus.sources.collect import collect
from components.corpus.sources.ingest_tables import write_candidates
from components.corpus.sources.multiaspect import read_metadata_shards
from components.corpus.sources.records.ledger import Ledger, balanced
from components.corpus.sources.records.source_records import SourceRecord
from components.corpus.sources.url_lists import read_url_lists
from components.settings.corpus import ListSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]


def records_of(source: Path, **changes: object) -> list[SourceRecord]:
    """Records of lists named "lists" in messages."""
    return list(
        balanced(read_url_lists(source, "lists", ListSettings.model_validate(changes)), Ledger())
    )


def values(records: list[SourceRecord]) -> list[dict[str, Any] | None]:
    return [record.values for record in records]


def test_the_same_list_reads_alike_from_csv_jsonl_and_parquet(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"url": ["http://a/1.jpg", "http://a/2.jpg"], "query": ["x, y", 'say "é"']}
    )
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "d.parquet", index=False)
    records = records_of(tmp_path)
    expected = table.to_dict("records")
    assert values(records) == expected * 4
    assert [records[0].place, records[-1].place] == ["a.csv:2", "d.parquet:2"]


def test_of_equal_column_names_no_value_is_lost(tmp_path: Path) -> None:
    names = ["url", "caption", "caption", "caption.2", "caption"]
    cells = ["http://a/1.jpg", "first", "second", "own", "third"]
    table = pa.table([[cell] for cell in cells], names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text(f"{','.join(names)}\n{','.join(cells)}\n")
    path = tmp_path / "candidates.parquet"
    read = values(records_of(tmp_path))
    assert read[0] == read[1]
    assert read[0] is not None
    assert list(read[0].values()) == cells
    write_candidates(read_url_lists(tmp_path / "a.parquet", "a", ListSettings()), path)
    (row,) = pq.read_table(path).to_pylist()
    assert row["caption_en"] == "first"
    assert json.loads(row["extra"])["caption.2"] == "second"


def test_broken_lines_are_records_with_a_reason_and_cost_no_neighbour(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b"url,query\nhttp://a/1\xff.jpg,x\nhttp://a/2.jpg,x,y,z\n\nb,\xc3\xa9\n"
    )
    (tmp_path / "b.jsonl").write_text('{"url": 1\n[1]\n' + "[" * 100_000 + '\n{"url": "u"}\n')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "d.csv").touch()
    records = records_of(tmp_path)
    problems = [(record.place, record.problem) for record in records if record.values is None]
    assert [place for place, _ in problems] == [
        "a.csv:3",
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
        "c.parquet:1",
    ]
    assert problems[0][1] == "4 cells under 2 headings"
    assert problems[2][1] == "a list, not an object"
    assert len(records) - len(problems) == 3


def test_lists_read_alike_gzipped_and_in_every_encoding_that_names_itself(tmp_path: Path) -> None:
    table = "url,query\r\nhttp://a/1.jpg,“é”\r\nhttp://a/2.jpg,水\r\n"
    lines = '{"url": "http://a/1.jpg", "query": "“é”"}\n{"url": "http://a/2.jpg", "query": "水"}\n'
    encodings = ("utf-8", "utf-8-sig", "utf-16")
    for number, encoding in enumerate(encodings):
        (tmp_path / f"{number}.csv").write_bytes(table.encode(encoding))
        (tmp_path / f"{number}.tsv.gz").write_bytes(
            gzip.compress(table.replace(",", "\t").encode(encoding))
        )
        (tmp_path / f"{number}.JSONL.gz").write_bytes(gzip.compress(lines.encode(encoding)))
    expected = [
        {"url": "http://a/1.jpg", "query": "“é”"},
        {"url": "http://a/2.jpg", "query": "水"},
    ]
    records = records_of(tmp_path)
    assert values(records) == expected * 9
    shards = tmp_path / "shards"
    shards.mkdir()
    text = json.dumps(expected, ensure_ascii=False)
    for number, encoding in enumerate(encodings):
        (shards / f"{number}.json.gz").write_bytes(gzip.compress(text.encode(encoding)))
    assert (
        values(list(balanced(read_metadata_shards(shards, "shards", ListSettings()), Ledger())))
        == expected * 3
    )


def test_a_file_that_ends_early_or_is_not_what_it_says_is_one_record_with_the_reason(
    tmp_path: Path,
) -> None:
    whole = gzip.compress(b"url\n" + b"http://a/1.jpg\n" * 50_000)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.jsonl.gz").write_bytes(whole[:40] + b"\xff" * 20 + whole[60:])
    (tmp_path / "plain.csv.gz").write_bytes(b"url\nhttp://a/1.jpg\n")
    (tmp_path / "zero.csv.gz").touch()
    records = records_of(tmp_path)
    problems = {record.place: record.problem for record in records if record.values is None}
    assert set(problems) >= {"cut.csv.gz", "flipped.jsonl.gz", "plain.csv.gz"}
    assert all("\n" not in text and str(tmp_path) not in text for text in problems.values())
    (tmp_path / "0.json.gz").write_bytes(b"[]")
    (shard,) = balanced(
        read_metadata_shards(tmp_path / "0.json.gz", "shard", ListSettings()), Ledger()
    )
    assert shard.problem.startswith("cannot read: Not a gzipped file")


def test_rows_of_every_bad_kind_are_candidates_or_losses_with_a_cause(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"url": "http://a/1.jpg", "caption": "x" * 10_000_000, "id": 1},
        {"url": "http://a/" + "y" * 10_000_000},
        {"url": "http://a/2.jpg", "id": 1, "photographer": "../../../etc/passwd"},
        {"url": "http://a/3\ufffd.jpg"},
        {"url": float("nan"), "caption": float("inf")},
        {"url": True},
        {"url": {"nested": "http://a/4.jpg"}},
        {"url": "http://a/5.jpg", "caption": "Caf\ufffd", "width": 10**400},
        {},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = tmp_path / "candidates.parquet"
    coverage = write_candidates(
        read_url_lists(tmp_path / "list.jsonl", "list.jsonl", ListSettings()), path
    )
    table = pq.read_table(path).to_pandas()
    assert table["cause"].fillna("-").tolist() == [
        "-",
        "bad_url",
        "-",
        "bad_url",
        "missing_url",
        "wrong_type",
        "wrong_type",
        "-",
        "missing_url",
    ]
    assert len(table["caption_en"][0]) == 10_000_000
    assert table["detail"][1] == "longer than 4096 characters"
    assert coverage.problems["duplicate_id"] == 1
    assert coverage.problems["undecodable_text"] == 2


def test_half_characters_repeated_keys_and_endless_numbers_cost_what_they_are(
    tmp_path: Path,
) -> None:
    lines = [
        '{"url": "http://a/1.jpg?x=\\ud83d"}',
        '{"url": "http://a/2.jpg", "caption": "a \\ud800 lake"}',
        '{"url": "http://a/3.jpg", "url": "http://a/4.jpg"}',
        '{"url": "http://a/5.jpg", "n": ' + "9" * 5000 + "}",
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    path = tmp_path / "candidates.parquet"
    source = read_url_lists(tmp_path / "list.jsonl", "list.jsonl", ListSettings())
    coverage = write_candidates(source, path)
    rows = pq.read_table(path).to_pylist()
    assert [row["cause"] for row in rows] == ["bad_url", None, None, "broken_record"]
    # Also for the checks of captions, which refuse what could not be read.
    assert rows[1]["caption_en"] == "a \ufffd lake"
    assert coverage.problems["undecodable_text"] == 2
    assert (rows[2]["image_url"], rows[2]["extra"]) == (
        "http://a/3.jpg",
        '{"url.2": "http://a/4.jpg"}',
    )
    assert rows[3]["detail"] == "a number with too many digits"


@pytest.mark.parametrize("make", ["missing", "empty", "wrong"])
def test_an_unusable_list_names_the_setting(tmp_path: Path, make: str) -> None:
    source = tmp_path / "list.txt"
    if make == "empty":
        source.mkdir()
    if make == "wrong":
        source.touch()
    with pytest.raises(ValueError, match=r"^list\.txt: .*ingest\.source"):
        read_url_lists(source, "list.txt", ListSettings())


def test_a_folder_without_lists_names_what_is_there_and_a_list_that_leads_nowhere_is_refused(
    tmp_path: Path,
) -> None:
    source = tmp_path / "lists"
    source.mkdir()
    (source / "list\n.txt").write_text("http://a/1.jpg\n")
    with pytest.raises(ValueError, match=r"^lists: none of its 1 files is read, such as list\\n"):
        read_url_lists(source, "lists", ListSettings())
    (source / "a.csv").write_text("url\nhttp://a/1.jpg\n")
    (source / "b.csv").symlink_to("gone.csv")
    with pytest.raises(ValueError, match=r"^lists/b\.csv: a link that leads to no file; mend"):
        read_url_lists(source, "lists", ListSettings())
    (source / "b.csv").unlink()
    os.mkfifo(source / "b.csv")
    with pytest.raises(ValueError, match=r"^lists/b\.csv: no regular file; mend"):
        read_url_lists(source, "lists", ListSettings())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "in holds no record: its files are empty, or have a heading and nothing else"),
        (b"\xef\xbb\xbfurl,caption\n", "in holds no record: "),
        (
            b"url,caption\nftp://a/1.jpg,x\n",
            r"none of 1 candidates of in could be had \(bad_url 1\); the first, a\.csv:2: scheme "
            r"is not http or https; data/ingest/losses\.parquet lists each",
        ),
    ],
)
def test_a_source_of_which_nothing_comes_says_why_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_bytes(content)
    ingest = load_settings(ROOT / "params.yaml").ingest
    ingest = ingest.model_copy(update={"kind": "urls", "source": "in"})
    with pytest.raises(ValueError, match=f"^{message}"):
        collect(ingest, tmp_path / "out", root=tmp_path, state_dir=tmp_path / "runs")


def test_metadata_shards_are_accounted_for_record_by_record(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    good = {"image_url": "http://a/1.jpg", "en_caption": "one", "id": "x", "aspect": "16:9"}
    (shards / "0000.json").write_text(
        json.dumps(
            [
                good,
                good | {"image_url": "HTTP://A:80/1.jpg#x", "id": "y"},
                good | {"image_url": "http://a/2.jpg"},
                {"en_caption": "no address"},
                {"image_url": float("nan")},
                {"image_url": ["http://a/3.jpg"]},
                {"image_url": "not an address"},
                {"image_url": "http://a/4.jpg", "en_caption": 7, "photographer": {"n": 1}},
                "text",
                None,
            ]
        )
    )
    (shards / "0001.json").write_text('[{"image_url": "http://a/5.jpg"')
    (shards / "0002.json").write_text('{"data": [{"image_url": "http://a/6.jpg"}]}')
    (shards / "0003.json").write_bytes(b"\xff\xfe{}")
    path = tmp_path / "candidates.parquet"
    coverage = write_candidates(
        read_metadata_shards(shards, "shards", ListSettings()), path
    ).report()
    table = pq.read_table(path).to_pandas()
    assert table["cause"].fillna("-").tolist() == [
        "-",
        "duplicate_url",
        "-",
        "missing_url",
        "missing_url",
        "wrong_type",
        "bad_url",
        "-",
        "broken_record",
        "broken_record",
        "broken_record",
        "-",
        "broken_record",
    ]
    assert coverage["records"] == 13
    assert coverage["problems"] == {
        "bad_url": 1,
        "broken_record": 4,
        "duplicate_id": 1,
        "duplicate_url": 1,
        "missing_url": 2,
        "wrong_type": 1,
    }
    assert coverage["wrong_type"] == {"caption_en": 1, "image_url": 1, "photographer": 1}
    assert coverage["unknown_keys"]["aspect"] == 3
    assert coverage["field_share"]["image_url"] == pytest.approx(6 / 13)
    assert json.loads(table["extra"][0]) == {"aspect": "16:9"}
