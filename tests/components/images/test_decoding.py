from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.images.decoding import (
    ImageUndecodable,
    decode_as_stored,
    decode_both,
    decode_rgb,
    read_header,
    read_rgb,
)

ROOT = Path(__file__).parents[3]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height: int = 48, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["ng-32703.jpg", "galen-crout-175291.jpg", "spacex-81773.jpg"])
def test_strict_jpeg_decode_gives_the_pixels_of_pil(name: str) -> None:
    path = ROOT / "data" / "sample" / name
    decoded = read_rgb(path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decoded.pixels, np.asarray(image.convert("RGB")))
    assert (decoded.integrity, decoded.note) == ("ok", None)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_decodes_as_pil_does(
    subsampling: int, progressive: bool, mode: str
) -> None:
    data = encoded(
        photo(47, 63).convert(mode), "JPEG", subsampling=subsampling, progressive=progressive
    )
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    decoded = decode_rgb(data)
    np.testing.assert_array_equal(decoded.pixels, expected)
    notes = {"RGB": None, "L": "L converted to RGB"}
    assert decoded.note == notes.get(mode, "CMYK without a profile, CMYK converted to RGB")


def test_as_stored_neither_turns_nor_looks_at_alpha_or_profiles() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(48, 64), "PNG", exif=exif.tobytes())
    assert decode_rgb(data).pixels.shape == (64, 48, 3)
    stored = decode_as_stored(data)
    np.testing.assert_array_equal(stored.pixels, np.asarray(photo(48, 64)))
    assert (stored.header.height, stored.header.width) == (64, 48)
    seen, both = decode_both(data)
    np.testing.assert_array_equal(both, stored.pixels)
    np.testing.assert_array_equal(seen.pixels, decode_rgb(data).pixels)


def test_one_decode_gives_one_array_where_the_policies_agree() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        seen, stored = decode_both(encoded(photo(), kind))
        assert seen.pixels is stored, kind


def test_alpha_palette_and_animation_are_converted_and_noted() -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(0)
    data = encoded(rgba, "PNG")
    np.testing.assert_array_equal(decode_as_stored(data).pixels, np.asarray(photo()))
    decoded = decode_rgb(data)
    assert (decoded.pixels == 255).all()
    assert (decoded.note, decoded.alpha_fraction) == ("RGBA converted to RGB", 1.0)
    assert decode_rgb(encoded(photo().quantize(8), "PNG")).note == "P converted to RGB"
    frames = encoded(photo(), "GIF", save_all=True, append_images=[photo().rotate(90)])
    assert "first of 2 frames" in (decode_rgb(frames).note or "")


def test_flipped_bits_that_pil_accepts_are_recorded() -> None:
    intact = encoded(photo(256, 256), "JPEG", quality=90)
    recorded = []
    for position in range(1000, len(intact) - 2, 997):
        data = bytearray(intact)
        data[position] ^= 0x10
        try:
            decoded = decode_rgb(bytes(data))
        except ImageUndecodable:
            continue
        recorded.append(decoded.integrity)
    # A flip may also give another valid stream; most do not.
    assert sum(integrity != "ok" for integrity in recorded) >= 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"not an image at all", "not an image"),
        (encoded(photo(), "JPEG")[:400], "cannot decode"),
        (encoded(photo(), "PNG")[:200], "cannot decode"),
    ],
)
def test_undecodable_bytes_say_why(data: bytes, message: str) -> None:
    with pytest.raises(ImageUndecodable, match=message):
        decode_rgb(data)


def test_a_bomb_is_refused_by_its_header_and_large_headers_are_fine_below_the_limit() -> None:
    data = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(ImageUndecodable, match=r"20000x20000 is 400\.0 megapixels, limit 399"):
        decode_rgb(data, max_megapixels=399)
    limit = Image.MAX_IMAGE_PIXELS
    assert read_header(data, max_megapixels=400).width == 20000
    assert limit == Image.MAX_IMAGE_PIXELS


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"]))
def test_damaged_files_decode_or_raise_the_typed_error_only(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(photo(), kind))
    for position in rng.integers(0, len(data), 8):
        data[position] = rng.integers(0, 256)
    try:
        decoded = decode_rgb(bytes(data[: rng.integers(1, len(data) + 1)]), max_megapixels=1)
    except ImageUndecodable:
        return
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape[2] == 3


def test_a_missing_file_is_undecodable(tmp_path: Path) -> None:
    with pytest.raises(ImageUndecodable, match="cannot read: No such file"):
        read_rgb(tmp_path / "absent.jpg")
