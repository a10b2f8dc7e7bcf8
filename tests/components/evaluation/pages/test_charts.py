"""Charts are well-formed, escaped and deterministic."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

from hypothesis import example, given
from hypothesis import strategies as st

from components.evaluation.pages.charts import Series, line_chart, nice_ticks


def test_names_are_escaped_and_the_markup_is_well_formed() -> None:
    svg = line_chart(
        [Series("<b>&", [0, 1], [1.0, 2.0]), Series("b", [0, 1], [2.0, 1.0])],
        x_label='step "x"',
        y_label="<loss>",
    )
    ElementTree.fromstring(svg)
    assert "<b>" not in svg


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    values = [math.nan, 0.0, -1.0, math.inf, 2.0, 3.0]
    svg = line_chart([Series("a", range(6), values)], x_label="x", y_label="y", log_y=True)
    line = ElementTree.fromstring(svg).find("polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == 2


def test_nothing_to_draw_gives_no_chart() -> None:
    assert line_chart([Series("a", [0], [math.nan])], x_label="x", y_label="y") == ""
    assert line_chart([], x_label="x", y_label="y") == ""


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.booleans())
@example(2.225073858507e-311, 1.0, True)
@example(1e-249, 1e249, True)
@example(-1e249, 2e249, False)
@example(-1.7e308, 1.7e308, False)
def test_any_finite_range_gives_well_formed_markup(low: float, span: float, log: bool) -> None:
    y = [low, low + span, low + span / 2]
    svg = line_chart([Series("a", [0, 5, 10], y)], x_label="x", y_label="y", log_y=log)
    assert svg == "" or ElementTree.fromstring(svg) is not None


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_inside_evenly_spaced_and_few(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    tolerance = 1e-6 * span + 1e-9
    assert 1 <= len(ticks) <= 12
    assert all(low - tolerance <= tick <= high + tolerance for tick in ticks)


def test_ticks_of_a_known_range() -> None:
    assert nice_ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_names_of_a_legend_stay_whole_and_apart() -> None:
    names = ["loss", "loss l2", "loss perceptual gmsd", "loss wavelet l1", "a"]
    svg = line_chart([Series(n, [1, 2], [1, 2]) for n in names], x_label="step", y_label="loss")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', svg)
    placed = [(float(x), float(y), name) for x, y, name in found if name in names]
    assert [name for *_, name in placed] == names
    for (x, y, name), (other, below, _) in itertools.pairwise(placed):
        # Behind the end of the one before, or in the next row.
        assert other > x + 8 * len(name) if below == y else below > y
    assert max(x + 8 * len(name) for x, _, name in placed) <= 560
    height = float(re.search(r'viewBox="0 0 560 ([\d.]+)"', svg)[1])  # type: ignore[index]
    assert height > max(y for _, y, _ in placed)
