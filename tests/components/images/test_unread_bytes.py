"""What is said of bytes in which no picture is found (`bad_files.py` has a kind for each, too)."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from components.images.decoding import ImageUndecodable, decode_rgb, read_header
from components.images.unread_bytes import known_flaw, what_it_is

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    NOISE.save(buffer, kind, **options)
    return buffer.getvalue()


def said(data: bytes) -> str:
    with pytest.raises(ImageUndecodable) as found:
        decode_rgb(data)
    return str(found.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_of_sound_pictures_nothing_is_said(kind: str) -> None:
    assert known_flaw(encoded(kind)) is None
    assert decode_rgb(encoded(kind)).integrity == "ok"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!doctype HTML>", "HTML page"),
        (b"\xef\xbb\xbf \n<!-- a -->\n<html>", "HTML page"),
        ("\ufeff<html>".encode("utf-16-le"), "HTML page"),
        (b"<?xml version='1.0'?><svg/>", "SVG drawing: vectors, no pixels"),
        (b"<?xml version='1.0'?><Error>NoSuchKey</Error>", "text"),
        ("no\u00e7\u00e3o".encode(), "text"),
        # A character of three bytes on the edge of what is looked at.
        (b"a" * 4095 + "\u6e56".encode(), "text"),
        (bytes(9), "zero bytes alone"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0", "video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0", "camera raw: develop it"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw: develop it"),
        (b"\0\5\x16\7\0\2", "what macOS keeps beside a file of that name (AppleDouble)"),
        (b"BMx", "BMP with a damaged header"),
        (b"MM\0+\0\x08\0\0", "big-endian BigTIFF: convert it"),
        (b"\x07\x99\xfe\xff\x01", None),
    ],
)
def test_bytes_are_called_by_what_they_are(data: bytes, what: str | None) -> None:
    assert what_it_is(data) == what
    wanted = "not an image that PIL knows" + ("" if what is None else f" ({what})")
    assert said(data) == wanted


def test_every_cut_of_a_jpeg_before_its_scan_says_so_and_none_after_it() -> None:
    data = encoded("JPEG")
    scan = data.index(b"\xff\xda")
    for end in (5, 20, scan - 1):
        assert "(JPEG that ends before its pixels)" in said(data[:end])
    assert known_flaw(data[: scan + 400]) is None


def test_a_webp_is_cut_when_it_is_shorter_than_it_says() -> None:
    data = encoded("WEBP")
    assert known_flaw(data[:-2]) == "WebP that ends early"
    assert "(WebP that ends early)" in said(data[:200])


@pytest.mark.parametrize("precision", [8, 12])
def test_a_jpeg_of_12_bits_is_named(precision: int) -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = precision
    found = known_flaw(bytes(data))
    assert found == (
        None if precision == 8 else "JPEG of 12 bits a channel, of which 8 are read: convert it"
    )


@pytest.mark.parametrize("tags", [{50706: b"\1\4\0\0"}, {254: 1}, {254: 0}, {}])
def test_the_preview_in_front_of_a_camera_raw_is_not_taken_for_the_photograph(
    tags: dict[int, object],
) -> None:
    data = encoded("TIFF", tiffinfo=tags)
    if not tags or tags == {254: 0}:
        assert read_header(data).width == 60
    else:
        assert said(data) == "camera raw: develop it; PIL shows its preview alone"


def tiff(order: str, version: int, **tags: int | tuple[int, ...]) -> bytes:
    """A directory of 16-bit values behind eight bytes of pixels."""
    names = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262}
    names |= {"offset": 273, "channels": 277, "rows": 278, "counts": 279, "format": 339}
    big = version == 43
    start = 24 if big else 16
    entry, inline = (20, 8) if big else (12, 4)
    head = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), start)
    rows, spilled = b"", b""
    behind = start + (8 if big else 2) + entry * len(tags) + (8 if big else 4)
    for name, value in sorted(tags.items(), key=lambda item: names[item[0]]):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > inline:
            packed, spilled = (
                struct.pack(order + ("Q" if big else "I"), behind + len(spilled)),
                (spilled + packed),
            )
        rows += struct.pack(order + ("HHQ" if big else "HHI"), names[name], 3, len(values))
        rows += packed.ljust(inline, b"\0")
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    mark = b"II" if order == "<" else b"MM"
    return mark + head + bytes(8) + count + rows + bytes(8 if big else 4) + spilled


@pytest.mark.parametrize(("order", "version"), [("<", 42), (">", 42), ("<", 43)])
def test_a_tiff_of_a_kind_that_is_not_read_is_no_damaged_one(order: str, version: int) -> None:
    common = {"width": 1, "height": 1, "offset": 8, "rows": 1, "counts": 8}
    fractions = {"bits": (32, 32, 32), "photometric": 2, "channels": 3, "format": (3, 3, 3)}
    found = what_it_is(tiff(order, version, compression=1, **fractions, **common))
    assert found == "TIFF of 3 x 32-bit fractions, photometric 2: convert it"
    rare = tiff(order, version, bits=8, compression=34926, photometric=1, **common)
    expected = "TIFF of 1 x 8-bit numbers, photometric 1, compression 34926: convert it"
    assert what_it_is(rare) == expected
    assert said(rare) == f"not an image that PIL knows ({expected})"
    assert what_it_is(rare[:40]) == "TIFF with a damaged header"
