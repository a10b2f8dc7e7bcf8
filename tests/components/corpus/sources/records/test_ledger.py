from __future__ import annotations

import pytest

from components.corpus.sources.records.ledger import Ledger, balanced
from components.corpus.sources.records.source_records import SourceEnd, SourceRecord

RECORD = SourceRecord("a:2", {"url": "x"}, units=3)
LOSS = SourceRecord("a:5", None, "broken")


@pytest.mark.parametrize("total", [4, 6])
def test_a_reader_that_drops_or_invents_a_line_is_found_out(total: int) -> None:
    end = SourceEnd("a", "lines", total, {"header": 1})
    with pytest.raises(ValueError, match=rf"^a: {total} lines were read and 5 are"):
        list(balanced([RECORD, LOSS, end], Ledger()))


def test_files_are_balanced_each_on_its_own_and_summed_by_unit() -> None:
    ledger = Ledger()
    first = SourceEnd("a", "lines", 5, {"header": 1}, {"loosely_quoted": 2})
    second = SourceEnd("b", "lines", 2, {"blank": 1})
    third = SourceEnd("c", "rows", 0)
    assert list(balanced([RECORD, LOSS, first, LOSS, second, third], ledger)) == [
        RECORD,
        LOSS,
        LOSS,
    ]
    report = ledger.report()
    assert report["totals"] == {
        "lines": {
            "files": 2,
            "total": 7,
            "records": 1,
            "in_records": 3,
            "losses": 2,
            "in_losses": 2,
            "apart": {"header": 1, "blank": 1},
            "notes": {"loosely_quoted": 2},
        },
        "rows": {
            "files": 1,
            "total": 0,
            "records": 0,
            "in_records": 0,
            "losses": 0,
            "in_losses": 0,
            "apart": {},
            "notes": {},
        },
    }
    assert [file["file"] for file in report["files"]] == ["a", "b", "c"]
