"""Colours that a file names by numbers (ITU-T H.273): `cICP` of PNG, `nclx` of AVIF."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from icc_bytes import ADOBE, rgb_profile
from PIL import Image, PngImagePlugin

from components.images.colour_profiles import coded_reading, to_srgb
from components.images.decoding import decode_rgb, read_header

STEPS = np.linspace(0, 255, 6).astype(np.uint8)
COLOURS = np.stack(np.meshgrid(STEPS, STEPS, STEPS), axis=-1).reshape(18, 12, 3)
# Chromaticities x, y of red, green and blue (H.273, table 2); white is D65.
CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
WHITE = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])


def to_xyz(primaries: int) -> np.ndarray:
    """(3, 3): linear red, green, blue to XYZ under D65 (SMPTE RP 177)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in CHROMATICITIES[primaries]]).T
    return columns * np.linalg.solve(columns, WHITE)


def expected(colours: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """sRGB by arithmetic: both whites are D65, so no adaptation is needed."""
    values = colours / 255
    if transfer == 13:
        values = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    elif transfer == 4:
        values = values**2.2
    linear = values @ to_xyz(primaries).T @ np.linalg.inv(to_xyz(1)).T
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * curve)


def png(*extra: tuple[bytes, bytes], mode: str = "RGB", icc: bytes | None = None) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, content in extra:
        info.add(name, content)
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).convert(mode).save(buffer, "PNG", pnginfo=info, icc_profile=icc)
    return buffer.getvalue()


def cicp(primaries: int, transfer: int, full: int = 1) -> tuple[bytes, bytes]:
    return b"cICP", bytes([primaries, transfer, 0, full])


@pytest.mark.parametrize(
    ("primaries", "transfer", "name"),
    [(12, 13, "Display P3"), (9, 13, "BT.2020"), (12, 4, "Display P3, gamma 2.2")],
)
def test_the_colours_of_a_png_are_those_of_its_numbers(
    primaries: int, transfer: int, name: str
) -> None:
    data = png(cicp(primaries, transfer))
    seen = decode_rgb(data)
    assert (seen.integrity, seen.note) == ("ok", None)
    assert seen.header.color_space == read_header(data).color_space == name
    wanted = expected(COLOURS, primaries, transfer)
    # Two roundings; where the gamut is left, clipping makes the slope of the curve large.
    assert np.abs(seen.pixels - wanted).max() <= 2
    assert np.abs(wanted - COLOURS).max() > 30


@pytest.mark.parametrize("transfer", [13, 1, 6])
def test_srgb_by_numbers_is_not_touched(transfer: int) -> None:
    seen = decode_rgb(png(cicp(1, transfer)))
    np.testing.assert_array_equal(seen.pixels, COLOURS)
    assert (seen.header.color_space, seen.note) == ("sRGB", None)


@pytest.mark.parametrize(
    ("codes", "name", "note"),
    [
        ((9, 16, 1), "BT.2020, PQ", "colours of BT.2020, PQ not applied"),
        ((9, 18, 1), "BT.2020, HLG", "colours of BT.2020, HLG not applied"),
        ((22, 13, 1), "primaries 22, transfer 13", "colours of primaries 22, transfer 13 not"),
        ((12, 13, 0), "untagged", "cICP of a narrow range not applied"),
        ((2, 2, 1), "untagged", None),
    ],
)
def test_numbers_that_are_not_understood_are_noted(
    codes: tuple[int, int, int], name: str, note: str | None
) -> None:
    seen = decode_rgb(png(cicp(*codes)))
    np.testing.assert_array_equal(seen.pixels, COLOURS)
    assert seen.header.color_space == name
    assert (note is None) == (seen.note is None)
    assert note is None or note in str(seen.note)


def test_numbers_overrule_a_profile_and_grays_stay_gray() -> None:
    profile = rgb_profile("Adobe RGB (1998)", ADOBE, 563 / 256)
    assert decode_rgb(png(icc=profile)).header.color_space == "Adobe RGB (1998)"
    seen = decode_rgb(png(cicp(12, 13), icc=profile))
    assert (seen.header.color_space, seen.note) == ("Display P3", None)
    np.testing.assert_array_equal(seen.pixels, decode_rgb(png(cicp(12, 13))).pixels)
    gray = decode_rgb(png(cicp(12, 4), mode="L")).pixels
    assert np.ptp(gray.astype(int), axis=-1).max() <= 1
    np.testing.assert_array_equal(gray[0, 0], [0, 0, 0])


def test_a_broken_chunk_of_numbers_is_not_believed() -> None:
    data = bytearray(png(cicp(12, 13)))
    data[data.index(b"cICP") + 4] ^= 1
    seen = decode_rgb(bytes(data))
    assert seen.header.color_space == read_header(bytes(data)).color_space == "untagged"
    assert seen.note == "broken PNG chunk cICP left out"


@pytest.mark.parametrize(
    ("chunks", "note"),
    [
        ([(b"gAMA", struct.pack(">I", 45455))], None),
        ([(b"gAMA", struct.pack(">I", 100000))], "PNG gamma 1 not applied"),
        (
            [(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))],
            "PNG chromaticities not applied",
        ),
        ([(b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")], None),
    ],
)
def test_older_colour_chunks_are_noted_where_they_say_something_else(
    chunks: list[tuple[bytes, bytes]], note: str | None
) -> None:
    assert decode_rgb(png(*chunks)).note == note


def avif(primaries: int, transfer: int) -> bytes:
    """Pillow writes 1 and 13; other numbers are put in their place."""
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "AVIF", quality=100, subsampling="4:4:4", speed=10)
    data = bytearray(buffer.getvalue())
    at = data.index(b"colrnclx") + 8
    assert struct.unpack_from(">HH", data, at) == (1, 13)
    struct.pack_into(">HH", data, at, primaries, transfer)
    return bytes(data)


def test_the_colours_of_an_avif_are_those_of_its_box() -> None:
    plain, wide = decode_rgb(avif(1, 13)), decode_rgb(avif(12, 13))
    assert (plain.header.color_space, wide.header.color_space) == ("sRGB", "Display P3")
    np.testing.assert_array_equal(wide.pixels, to_srgb(plain.pixels, coded_reading(12, 13)))
    assert np.abs(plain.pixels.astype(int) - wide.pixels).max() > 30
    high = decode_rgb(avif(9, 16))
    assert high.note == "colours of BT.2020, PQ not applied"
