from __future__ import annotations

import io
import re

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from components.images.decoding import ImageUndecodable, decode_rgb
from components.images.jpeg_scans import (
    NO_END,
    SCANS_MISSING,
    decode_strictly,
    is_progressive,
    scans_are_complete,
)


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image = small.resize((240, 192), Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_missing_end_marker_is_a_note_and_the_pixels_are_the_same(
    mode: str, progressive: bool
) -> None:
    whole = jpeg(mode, progressive=progressive)
    decoded = decode_rgb(whole[:-2])
    np.testing.assert_array_equal(decoded.pixels, decode_rgb(whole).pixels)
    assert decoded.integrity == "ok"
    assert NO_END in (decoded.note or "")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_missing_pixels_are_damage_with_and_without_an_end_marker(
    mode: str, progressive: bool, end: bytes
) -> None:
    whole = jpeg(mode, progressive=progressive)
    try:
        integrity = decode_rgb(whole[: len(whole) * 2 // 3] + end).integrity
    except ImageUndecodable as problem:
        integrity = str(problem)
    assert integrity != "ok"


def test_a_progressive_file_cut_between_two_scans_is_not_whole() -> None:
    whole = jpeg(progressive=True)
    last_scan = [found.start() for found in re.finditer(b"\xff\xda", whole)][-1]
    # Up to the tables of the last scan: libjpeg alone has nothing to say against it.
    cut = whole[: whole.rindex(b"\xff\xc4", 0, last_scan)]
    simplejpeg.decode_jpeg(cut + b"\xff\xd9", strict=True)
    assert decode_strictly(cut + b"\xff\xd9", "RGB").damage == SCANS_MISSING
    assert decode_rgb(cut + b"\xff\xd9").integrity == SCANS_MISSING
    assert scans_are_complete(whole)
    assert not scans_are_complete(cut)
    assert decode_strictly(cut, "RGB").damage == "premature end of jpeg file"


def test_progressive_is_told_by_the_frame_and_not_by_a_thumbnail() -> None:
    inner = jpeg(progressive=True)
    assert is_progressive(inner)
    assert not is_progressive(jpeg(exif=b"Exif\0\0" + inner[:4000]))
    assert not is_progressive(inner[:30])


def test_a_thumbnail_in_the_metadata_is_no_scan() -> None:
    inner = jpeg()
    exif = b"Exif\0\0" + inner[:4000]
    whole = jpeg(exif=exif)
    assert scans_are_complete(whole)
    assert not scans_are_complete(whole[: whole.rindex(b"\xff\xda")])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\0\2\xff\xda\0\2", b"x" * 99])
def test_rubbish_has_no_complete_scans(data: bytes) -> None:
    assert not scans_are_complete(data)


def test_flipped_bits_in_cmyk_are_named() -> None:
    whole = bytearray(jpeg("CMYK"))
    found = []
    for place in range(len(whole) // 2, len(whole) - 2, 499):
        damaged = bytearray(whole)
        damaged[place] ^= 0x20
        result = decode_strictly(bytes(damaged), "CMYK")
        found.append(result.damage)
    # A flip may also give another valid stream.
    assert sum(damage is not None for damage in found) >= 3
