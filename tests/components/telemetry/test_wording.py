"""Numbers and lists in one line."""

from __future__ import annotations

from components.telemetry.wording import age_text, few


def test_a_long_list_says_how_many_more_there_are() -> None:
    assert few([], 2) == ""
    assert few(["a", "b"], 2) == "a, b"
    assert few(["a", "b", "c"], 2, "; ") == "a; b and 1 more"


def test_an_age_is_told_in_its_largest_whole_unit() -> None:
    ages = (59, 60, 7200, 86400 * 12)
    assert [age_text(seconds) for seconds in ages] == ["59 s", "1 min", "2 h", "12 d"]
