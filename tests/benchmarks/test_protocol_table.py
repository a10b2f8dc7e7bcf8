"""The page of protocols is what cards and tables say."""

from __future__ import annotations

import protocol_table


def test_the_page_of_protocols_is_up_to_date() -> None:
    assert protocol_table.PAGE.read_text("utf-8") == protocol_table.page(), (
        "docs/protocols.md is out of date: python benchmarks/protocol_table.py"
    )


def test_a_column_is_equal_only_with_an_id_and_on_a_suite() -> None:
    rows = [line.split(" | ") for line in protocol_table.columns()[2:]]
    equal = {row[0].rpartition("(`")[2].rstrip("`)") for row in rows if row[-1] == "yes |"}
    assert equal == {
        *("diffusion4k-2048", "diffusion4k-detail-2048", "diffusion4k-captions"),
        *("diffusion4k-wlf", "diffusion4k-detail-4096"),
    }
    assert all(row[-1].startswith(("yes", "no: ")) for row in rows)
