"""Tiles of one photograph: native pixels, no overlap, every place about equally likely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.training.vae.tiles import (
    CutPhotograph,
    LeftOut,
    Photograph,
    TileRules,
    cut_photograph,
    tile_places,
    working_size,
)


def rules(crop_px: int = 64, tile_px: int = 96, tiles: int = 2) -> TileRules:
    return TileRules(crop_px, tile_px, tiles, max_megapixels=10.0)


def test_photographs_keep_native_pixels_at_the_papers_crop_size() -> None:
    assert working_size(4000, 6000, 512) == (4000, 6000)
    assert working_size(4000, 6000, 128) == (1365, 2048)
    assert working_size(100, 120, 128) == (100, 120)


@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    tile_px=st.integers(1, 300),
    tiles=st.integers(1, 9),
    image_id=st.text(max_size=4),
)
def test_tiles_lie_inside_do_not_overlap_and_are_as_many_as_fit(
    height: int, width: int, tile_px: int, tiles: int, image_id: str
) -> None:
    places = tile_places(image_id, height, width, rules(1, tile_px, tiles))
    taken = np.zeros((height, width), dtype=int)
    for one in places:
        assert (one.height, one.width) == (min(height, tile_px), min(width, tile_px))
        assert one.top + one.height <= height
        assert one.left + one.width <= width
        taken[one.top : one.top + one.height, one.left : one.left + one.width] += 1
    assert taken.max() == 1
    fitting = max(1, height // tile_px) * max(1, width // tile_px)
    assert len(places) == min(tiles, fitting)
    assert places == tile_places(image_id, height, width, rules(1, tile_px, tiles))


def test_every_cell_and_every_shift_of_the_grid_is_drawn() -> None:
    places = [tile_places(str(n), 25, 32, rules(1, 10, 1))[0] for n in range(600)]
    # Two rows shifted by 0 to 5, three columns shifted by 0 to 2.
    assert {one.top for one in places} == {*range(6), *range(10, 16)}
    assert {one.left for one in places} == {0, 1, 2, 10, 11, 12, 20, 21, 22}


def test_a_tile_holds_the_pixels_of_its_place(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 310, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cut = cut_photograph(Photograph("a", tmp_path / "a.png"), rules(tiles=4))
    assert isinstance(cut, CutPhotograph)
    assert len(cut.records) == 4
    for one, record in zip(cut.places, cut.records, strict=True):
        region = pixels[one.top : one.top + 96, one.left : one.left + 96]
        assert record == region.tobytes()


def test_a_large_photograph_is_reduced_before_it_is_cut(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((2048, 1500)).convert("RGB")
    image.save(tmp_path / "a.png")
    cut = cut_photograph(Photograph("a", tmp_path / "a.png"), rules(tile_px=1024))
    assert isinstance(cut, CutPhotograph)
    reduced = np.asarray(image.resize((1024, 750), Image.Resampling.LANCZOS))
    assert [(one.height, one.width) for one in cut.places] == [(750, 1024)]
    assert cut.records[0] == reduced.tobytes()


@pytest.mark.parametrize(("size", "kept"), [((64, 300), True), ((63, 300), False)])
def test_a_photograph_without_room_for_a_crop_is_left_out_with_its_sizes(
    tmp_path: Path, size: tuple[int, int], kept: bool
) -> None:
    Image.new("RGB", size[::-1]).save(tmp_path / "thin.png")
    cut = cut_photograph(Photograph("t", tmp_path / "thin.png"), rules())
    assert isinstance(cut, CutPhotograph) == kept
    if isinstance(cut, LeftOut):
        assert (cut.image_id, cut.name, cut.kind) == ("t", "thin.png", "narrow")
        assert cut.reason.startswith("63x300 is 63x300")


def test_a_photograph_that_is_narrow_after_the_reduction_is_left_out(tmp_path: Path) -> None:
    # 100 rows hold a crop, but of 2,048 columns 1,024 stay, and with them 50 rows.
    Image.new("RGB", (2048, 100)).save(tmp_path / "panorama.png")
    cut = cut_photograph(Photograph("p", tmp_path / "panorama.png"), rules())
    assert isinstance(cut, LeftOut)
    assert "100x2048 is 50x1024" in cut.reason


def test_an_undecodable_photograph_is_left_out_with_the_decoders_words(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8not a picture")
    cut = cut_photograph(Photograph("b", tmp_path / "broken.jpg"), rules())
    assert cut == LeftOut("b", "broken.jpg", "undecodable", "not an image that PIL knows")
