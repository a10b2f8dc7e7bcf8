"""Sizes that differ and pictures that are not plain are said, never passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from components.evaluation.measuring.evaluation_run import find_picture
from components.evaluation.suites.picture_checks import measured_sizes, other_size, reading_notes
from components.evaluation.suites.suites import SuiteItem


def test_other_sizes_are_named_with_both_sizes(tmp_path: Path) -> None:
    items = [SuiteItem(name, "x", 32, 48, 0) for name in "ab"]
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (24, 16)).save(tmp_path / "b.png")
    found = [find_picture(tmp_path / f"{item.id}.png") for item in items]
    assert other_size(items, found) == (
        "1 of 2 pictures are 24x16 instead of 48x32 (width x height), such as b.png"
    )
    assert other_size(items[:1], found[:1]) == ""
    assert measured_sizes(found) == {"24x16": 1, "48x32": 1}


def test_depth_transparency_orientation_and_cmyk_are_noted(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "ink.jpg")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 16)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    names = ("deep.png", "clear.png", "ink.jpg", "turned.jpg", "plain.png")
    (note,) = reading_notes([find_picture(tmp_path / name) for name in names])
    assert note.startswith("4 of 5 pictures are not plain 8-bit sRGB")
    for words in ("16-bit", "transparency", "CMYK", "orientation 6"):
        assert words in note
    assert reading_notes([find_picture(tmp_path / "plain.png")]) == []


def test_of_several_frames_the_first_is_measured_and_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 90, 180)]
    for name in ("moving.webp", "moving.png", "pages.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        found = find_picture(tmp_path / name)
        (note,) = reading_notes([found])
        assert "first of 3 frames" in note
        # It is read as any plain picture: what was measured of it stays.
        assert found.content == found.sha256
