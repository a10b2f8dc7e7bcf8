"""Numbers and lists in one line."""

from __future__ import annotations

from components.telemetry.wording import age_text, few, legible, legible_lines


def test_a_long_list_says_how_many_more_there_are() -> None:
    assert few([], 2) == ""
    assert few(["a", "b"], 2) == "a, b"
    assert few(["a", "b", "c"], 2, "; ") == "a; b and 1 more"


def test_what_does_not_show_is_written_out_and_words_of_every_script_stay() -> None:
    assert legible("a\x1b[2J\nb\u202ec\udce9.jpg\x9b") == r"a\x1b[2J\nb\u202ec\udce9.jpg\x9b"
    for words in ("Müller Größe.jpg", "日本\u3000湖", "می\u200cخواهم", "👨\u200d👩", "a\tb", ""):
        assert legible(words) == words
    assert legible_lines("a\x1b\nb\n") == "a\\x1b\nb"
    assert few(["a\nerror: b"], 1) == r"a\nerror: b"


def test_an_age_is_told_in_its_largest_whole_unit() -> None:
    ages = (59, 60, 7200, 86400 * 12)
    assert [age_text(seconds) for seconds in ages] == ["59 s", "1 min", "2 h", "12 d"]
