from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from components.corpus.sources.answer_headers import forbidden_by_robots, retry_after_s

AGENT = "ultraflux-corpus/0.1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("7", 7.0),
        ("soon", None),
        ("\u00b2", None),
        ("\u0661", None),
        ("Wed, 21 Oct 2026 07:28:00 +99999999999999999999", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 252455702339.0),
        ("Sat, 01 Jan 2000 00:00:30 GMT", 30.0),
        ("Fri, 31 Dec 1999 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value, datetime(2000, 1, 1, tzinfo=UTC)) == expected


def test_a_date_without_a_zone_is_in_utc_wherever_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for zone in ("-0000", ""):
            said = f"Sat, 01 Jan 2000 00:00:30 {zone}".strip()
            assert retry_after_s(said, datetime(2000, 1, 1, tzinfo=UTC)) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        (["all"], None),
        (["noindex"], "noindex"),
        (["nofollow, NoImageAI"], "noimageai"),
        (["googlebot: noindex"], None),
        (["ultraflux-corpus: noindex, nofollow"], "noindex"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], None),
        (["max-image-preview:large, noai"], "noai"),
        (["all", "none"], "none"),
    ],
)
def test_robots_directives_for_us_are_found(values: list[str], expected: str | None) -> None:
    assert forbidden_by_robots(values, AGENT) == expected
