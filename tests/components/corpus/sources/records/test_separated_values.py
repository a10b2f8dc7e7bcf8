"""A stray quotation mark costs one line, and every line is accounted for."""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.corpus.sources.records.ledger import Ledger, balanced
from components.corpus.sources.records.separated_values import LONGEST_FIELD_LINES, SeparatedValues
from components.corpus.sources.records.source_records import SourceRecord


def read(
    text: str, separator: str = ",", columns: list[str] | None = None
) -> tuple[list[SourceRecord], Ledger]:
    """Records of a file, and its ledger, which balances."""
    reader = SeparatedValues(io.StringIO(text, newline=""), "list", separator, columns, None)
    ledger = Ledger()
    records = list(balanced([*reader.records(), reader.end()], ledger))
    # The independent count: what a text file yields line by line.
    assert ledger.files[0].total == len(list(io.StringIO(text, newline="")))
    return records, ledger


def plain(number: int) -> str:
    return f"http://a/{number}.jpg,a plain caption number {number}"


STRAY = [
    'http://a/4.jpg,"the ""unclosed quote at 24\' f/8',
    'http://a/4.jpg,"',
    'http://a/4.jpg,"a" b,"c',
    '"http://a/4.jpg,unclosed address',
]


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("at", [0, 4, 19])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stray_quotation_mark_costs_its_line_and_no_other(stray: str, at: int, end: str) -> None:
    lines = [plain(number) for number in range(20)]
    lines[at] = stray
    records, ledger = read(end.join(["url,caption", *lines, ""]))
    lost = [record for record in records if record.values is None]
    assert [record.place for record in lost] == [f"list:{at + 2}"]
    assert "quotation mark" in lost[0].problem
    assert len(records) == 20
    kept = [record.values["url"] for record in records if record.values is not None]
    assert kept == [f"http://a/{number}.jpg" for number in range(20) if number != at]
    account = ledger.files[0]
    assert (account.total, account.apart, account.records, account.losses) == (
        21,
        {"header": 1},
        19,
        1,
    )


def test_every_line_with_a_stray_mark_is_a_loss_of_its_own() -> None:
    lines = [f'http://a/{number}.jpg,"stray {number}' for number in range(20)]
    records, _ = read("\n".join(["url,caption", *lines]))
    assert [record.values for record in records] == [None] * 20


def test_a_stray_mark_in_a_single_column_costs_its_line() -> None:
    records, _ = read('url\n"http://a/1.jpg\nhttp://a/2.jpg\nhttp://a/3.jpg\n')
    assert [record.values for record in records] == [
        None,
        {"url": "http://a/2.jpg"},
        {"url": "http://a/3.jpg"},
    ]


def test_a_quoted_field_over_many_lines_is_one_record_at_its_first_line() -> None:
    caption = 'A lake, at dawn.\n\nSee http://b/page\n"and" so on'
    quoted = caption.replace('"', '""')
    records, ledger = read(f'url,caption\nhttp://a/1.jpg,"{quoted}"\n\n{plain(2)}\n')
    assert [(record.place, record.units) for record in records] == [("list:2", 4), ("list:7", 1)]
    assert records[0].values == {"url": "http://a/1.jpg", "caption": caption}
    account = ledger.files[0]
    assert account.apart == {"header": 1, "blank": 1}
    assert (account.records, account.in_records) == (2, 5)


def test_a_field_that_never_ends_is_given_up_after_a_bounded_number_of_lines() -> None:
    longest = "x\n" * (LONGEST_FIELD_LINES - 1)
    records, _ = read(f'url,caption\nhttp://a/1.jpg,"{longest}"\n')
    assert [record.units for record in records] == [LONGEST_FIELD_LINES]
    records, _ = read(f'url,caption\nhttp://a/1.jpg,"x\n{longest}"\n{plain(2)}\n')
    assert records[0].values is None
    assert f"{LONGEST_FIELD_LINES} lines on" in records[0].problem
    assert records[-1].values == {"url": "http://a/2.jpg", "caption": "a plain caption number 2"}


def test_marks_inside_a_cell_stay_and_loose_quoting_is_noted() -> None:
    records, ledger = read('url,caption\nhttp://a/1.jpg,a 5" nail\nhttp://a/2.jpg,"a" b\n')
    assert [record.values["caption"] for record in records if record.values] == ['a 5" nail', "a b"]
    assert ledger.files[0].notes == {"loosely_quoted": 1}


def test_headings_may_be_given_repeated_and_announced_by_a_separator() -> None:
    records, _ = read("http://a/1.jpg;x\n", ";", ["url", "caption"])
    assert [record.values for record in records] == [{"url": "http://a/1.jpg", "caption": "x"}]
    records, ledger = read("sep=;\nurl;url;caption\nhttp://a/1.jpg;http://a/2.jpg;x\n")
    assert [record.values for record in records] == [
        {"url": "http://a/1.jpg", "url.2": "http://a/2.jpg", "caption": "x"}
    ]
    assert ledger.files[0].apart == {"header": 2}


_CELLS = st.text(st.sampled_from('ab "\n\r,;é水'), max_size=8)
_ROWS = st.lists(st.tuples(_CELLS, _CELLS), max_size=8)


@given(_ROWS, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_well_formed_files_read_as_pythons_reader_reads_them(
    rows: list[tuple[str, str]], separator: str, end: str, quote_all: bool
) -> None:
    file = io.StringIO(newline="")
    # With few quotes, Python's writer leaves a lone "\r" bare, which its reader takes for an end.
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(["url", "caption", "note"])
    for number, cells in enumerate(rows):
        writer.writerow([f"http://a/{number}.jpg", *cells])
    text = file.getvalue()
    # The reference: one reader over the whole file.
    _, *expected = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    records, _ = read(text, separator)
    found = [list(record.values.values()) for record in records if record.values is not None]
    assert found == [cells for cells in expected if cells]
    assert len(found) == len(rows) or not quote_all


_ANY_LINE = st.one_of(
    st.integers(0, 9).map(plain),
    st.sampled_from([*STRAY, "", "\t", '"', '""', 'x,"', 'end"', "http://b/x,y", "a,b,c,d"]),
    st.text(st.sampled_from('ab",\r\x00;h'), max_size=12),
)


@given(st.lists(_ANY_LINE, max_size=14), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_of_any_file_every_line_is_accounted_for(lines: list[str], end: str, closed: bool) -> None:
    text = end.join(["url,caption", *lines]) + (end if closed else "")
    records, ledger = read(text)
    account = ledger.files[0]
    assert account.in_records + account.in_losses + sum(account.apart.values()) == account.total
    places = [record.place for record in records]
    assert len(set(places)) == len(places)
    # A plain line is a record, or is named as one that a quoted field runs over: never a second
    # one of the same, never none.
    kept: Counter[Any] = Counter(
        record.values["url"] for record in records if record.values and "caption" in record.values
    )
    wanted = Counter(line.partition(",")[0] for line in lines if line.startswith("http://a/"))
    strays = Counter(line.partition(",")[0] for line in lines if line in STRAY)
    assert not (wanted - strays) - kept
