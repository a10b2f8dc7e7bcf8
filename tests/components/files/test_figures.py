"""Figures have the same bytes for the same numbers, and one module saves all of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from components.files.figures import inline_svg, new_figure, save_png, save_png_and_svg


def drawing() -> Figure:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 1, 2], [1, 3, 2], marker="o", label="a < b")
    axes.legend()
    return figure


def test_equal_drawings_are_equal_files(tmp_path: Path) -> None:
    first = save_png_and_svg(drawing(), tmp_path / "one", "curve", dpi=60)
    second = save_png_and_svg(drawing(), tmp_path / "two", "curve", dpi=60)
    assert [path.name for path in first] == ["curve.png", "curve.svg"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert inline_svg(drawing(), "curve") == inline_svg(drawing(), "curve")


def test_two_figures_of_one_page_share_no_ids() -> None:
    one, two = inline_svg(drawing(), "one"), inline_svg(drawing(), "two")
    assert one.startswith("<svg")
    assert "a &lt; b" in one
    assert one != two


@pytest.mark.parametrize("signed", [False, True])
def test_only_a_signed_picture_names_its_program(signed: bool, tmp_path: Path) -> None:
    save_png(drawing(), tmp_path / "a.png", dpi=50, signed=signed)
    picture = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()))
    assert picture.size == (150, 100)
    assert ("Software" in picture.info) == signed


def test_no_other_module_saves_a_figure(root: Path) -> None:
    offending = [
        path.relative_to(root).as_posix()
        for room in ("components", "flows")
        for path in sorted((root / room).rglob("*.py"))
        if "savefig(" in path.read_text(encoding="utf-8")
    ]
    assert offending == ["components/files/figures.py"]
