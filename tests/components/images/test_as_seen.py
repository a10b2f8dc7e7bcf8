"""*As seen* against independent renderings: PIL's exif_transpose, ImageCms and alpha_composite."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from icc_bytes import ADOBE, P3, SRGB, cmyk_profile, gray_profile, rgb_profile
from PIL import Image, ImageCms, ImageOps

from components.images.as_seen import scaled_to_8_bits, transparent_share, upright
from components.images.decoding import (
    ImageUndecodable,
    decode_as_stored,
    decode_both,
    decode_rgb,
    read_header,
)

ADOBE_RGB = rgb_profile("Adobe RGB (1998)", ADOBE, 563 / 256)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode: str = "RGB", height: int = 40, width: int = 64) -> Image.Image:
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def exif(orientation: object) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def managed(image: Image.Image, icc: bytes) -> np.ndarray:
    """What a colour-managed viewer shows, by PIL's one-call interface."""
    shown = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return np.asarray(shown)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_pil_transposes_it(kind: str, orientation: int) -> None:
    options = {"WEBP": {"lossless": True}, "AVIF": {"speed": 10}}.get(kind, {})
    data = encoded(photo(), kind, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    decoded = decode_rgb(data)
    np.testing.assert_array_equal(decoded.pixels, expected)
    header = read_header(data)
    assert header == decoded.header
    assert (header.height, header.width) == expected.shape[:2]
    assert (header.stored_height, header.stored_width) == (40, 64)
    assert header.orientation == orientation


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_noted_and_upright(orientation: int) -> None:
    decoded = decode_rgb(encoded(photo(), "JPEG", exif=exif(orientation)))
    assert decoded.pixels.shape == (40, 64, 3)
    assert (decoded.header.orientation, decoded.integrity) == (1, "ok")
    assert f"EXIF orientation {orientation}" in (decoded.note or "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_no_reason_to_lose_a_photograph(kind: str) -> None:
    decoded = decode_rgb(encoded(photo(), kind, exif=b"Exif\0\0" + bytes(range(200))))
    assert (decoded.header.orientation, decoded.integrity) == (1, "ok")
    # Of a JPEG PIL has swallowed it before.
    assert ("broken EXIF" in (decoded.note or "")) == (kind != "JPEG")


def test_exif_behind_the_pixels_of_a_png_turns_it() -> None:
    plain = encoded(photo(), "PNG")
    content = exif(6).tobytes().removeprefix(b"Exif\0\0")
    name = b"eXIf"
    block = struct.pack(">I", len(content)) + name + content
    block += struct.pack(">I", zlib.crc32(name + content))
    data = plain[:-12] + block + plain[-12:]
    assert read_header(data).orientation == 6
    np.testing.assert_array_equal(decode_rgb(data).pixels, np.rot90(np.asarray(photo()), -1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5))
def test_turning_is_a_group_action(orientation: int, height: int, width: int) -> None:
    pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    turned = upright(pixels, orientation)
    assert turned.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(upright(turned, inverse), pixels)


@pytest.mark.parametrize(
    ("mode", "kind", "icc", "name"),
    [
        ("RGB", "JPEG", ADOBE_RGB, "Adobe RGB (1998)"),
        ("RGB", "PNG", rgb_profile("Display P3", P3), "Display P3"),
        ("RGB", "TIFF", rgb_profile("Display P3", P3), "Display P3"),
        ("RGB", "WEBP", ADOBE_RGB, "Adobe RGB (1998)"),
        ("L", "JPEG", gray_profile("Gray Gamma 1.8", 1.8), "Gray: Gray Gamma 1.8"),
        ("L", "PNG", gray_profile("Gray Gamma 1.8", 1.8), "Gray: Gray Gamma 1.8"),
        ("CMYK", "JPEG", cmyk_profile("Test inks"), "CMYK: Test inks"),
        ("CMYK", "TIFF", cmyk_profile("Test inks"), "CMYK: Test inks"),
    ],
)
def test_profiles_are_applied_as_lcms_does(mode: str, kind: str, icc: bytes, name: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(photo(mode), kind, icc_profile=icc, exif=exif(6), **options)
    with Image.open(io.BytesIO(data)) as image:
        # PIL turns a TIFF when it loads it.
        image.load()
        expected = managed(image.convert(mode), icc)
        stored = np.asarray(image.convert("RGB"))
    expected = expected if kind == "TIFF" else np.rot90(expected, -1)
    seen, kept = decode_both(data)
    np.testing.assert_array_equal(seen.pixels, expected)
    np.testing.assert_array_equal(kept, stored)
    assert (seen.header.color_space, read_header(data).color_space) == (name, name)
    # The picture is another one: an ignored profile would be seen.
    assert np.abs(expected.astype(int) - np.rot90(stored, -(kind != "TIFF"))).max() > 8


def test_a_gray_picture_under_an_rgb_profile_is_read_as_equal_channels() -> None:
    data = encoded(photo("L"), "JPEG", icc_profile=ADOBE_RGB)
    with Image.open(io.BytesIO(data)) as image:
        expected = managed(image.convert("RGB"), ADOBE_RGB)
    np.testing.assert_array_equal(decode_rgb(data).pixels, expected)


def test_a_profile_that_is_srgb_by_its_effect_costs_nothing() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seen, stored = decode_both(encoded(photo(), "JPEG", icc_profile=icc))
    assert seen.pixels is stored
    assert (seen.header.color_space, seen.note) == ("sRGB", None)
    # The same primaries under another tone curve are something else.
    other = decode_rgb(encoded(photo(), "JPEG", icc_profile=rgb_profile("dark", SRGB, 1.8)))
    assert other.header.color_space == "dark"
    assert not np.array_equal(other.pixels, stored)


@pytest.mark.parametrize(
    ("icc", "note"),
    [
        (b"no profile at all", "broken colour profile"),
        (ADOBE_RGB[:300], "broken colour profile"),
        (cmyk_profile("inks"), "colour profile for CMYK not applied"),
        (gray_profile("gray", 1.8), "colour profile for GRAY not applied"),
    ],
)
def test_a_profile_that_cannot_be_used_is_noted(icc: bytes, note: str) -> None:
    seen, stored = decode_both(encoded(photo(), "PNG", icc_profile=icc))
    assert seen.pixels is stored
    assert (seen.integrity, seen.header.color_space) == ("ok", "untagged")
    assert note in (seen.note or "")


def test_cmyk_without_a_profile_is_converted_plainly_and_says_so() -> None:
    decoded = decode_rgb(encoded(photo("CMYK"), "JPEG"))
    assert decoded.header.color_space == "CMYK: untagged"
    assert "CMYK without a profile" in (decoded.note or "")


def test_lab_is_shown_in_its_colours() -> None:
    lab = ImageCms.profileToProfile(
        photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    data = encoded(lab, "TIFF")
    seen, stored = decode_both(data)
    back = ImageCms.profileToProfile(
        lab,
        ImageCms.createProfile("LAB"),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
    )
    assert np.abs(seen.pixels.astype(int) - np.asarray(back)).max() <= 1
    # Two conversions in 8 bits of Lab.
    assert np.abs(seen.pixels.astype(int) - np.asarray(photo())).mean() < 2
    np.testing.assert_array_equal(stored, seen.pixels)
    assert seen.header.color_space == "Lab"


def transparent(mode: str) -> Image.Image:
    image = photo("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_is_composited_on_white(mode: str, kind: str) -> None:
    data = encoded(transparent(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        rgba = image.convert("RGBA")
        stored = np.asarray(image.convert("RGB"))
    white = Image.new("RGBA", rgba.size, "white")
    expected = np.asarray(Image.alpha_composite(white, rgba).convert("RGB")).astype(int)
    seen, kept = decode_both(data)
    assert np.abs(seen.pixels - expected).max() <= 1
    np.testing.assert_array_equal(kept, stored)
    assert seen.header.has_alpha
    share = 1 - np.asarray(rgba)[..., 3].mean() / 255
    assert seen.alpha_fraction == pytest.approx(share, abs=1e-12)


def test_profile_and_transparency_together() -> None:
    image = transparent("RGBA")
    seen = decode_rgb(encoded(image, "PNG", icc_profile=ADOBE_RGB)).pixels
    colours = managed(image.convert("RGB"), ADOBE_RGB).astype(float)
    cover = np.asarray(image)[..., 3:] / 255
    np.testing.assert_allclose(seen, colours * cover + 255 * (1 - cover), atol=0.51)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_transparent_colour_becomes_white(mode: str) -> None:
    image = Image.new(mode, (40, 30), 0 if mode != "RGB" else (9, 8, 7))
    image.paste(3 if mode != "RGB" else (90, 80, 70), (0, 0, 10, 30))
    if mode == "P":
        image.putpalette(bytes(range(12)))
    key = 3 if mode != "RGB" else (90, 80, 70)
    decoded = decode_rgb(encoded(image, "PNG", transparency=key))
    assert (decoded.pixels[:, :10] == 255).all()
    assert (decoded.pixels[:, 10:] < 10).all()
    assert decoded.alpha_fraction == 0.25


def test_opaque_pictures_have_no_transparent_share() -> None:
    assert decode_rgb(encoded(photo("RGBA"), "PNG")).alpha_fraction == 0.0
    assert transparent_share(None) == 0.0
    assert transparent_share(np.zeros((2, 2), np.uint8)) == 1.0


def test_sixteen_bits_are_scaled_and_never_clipped() -> None:
    values = (np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).astype(np.uint16)
    expected = np.rint(values / 257)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), kind)
        seen, stored = decode_both(data)
        for pixels in (seen.pixels, stored, decode_as_stored(data).pixels):
            for channel in range(3):
                np.testing.assert_array_equal(pixels[..., channel], expected)
        assert seen.header.bit_depth == 16
        assert seen.note == "I;16 converted to RGB"


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.floats(-3, 1e6, width=32), min_size=2, max_size=12),
    st.sampled_from([np.float32, np.int32]),
)
def test_scaling_keeps_order_and_ends_in_range(values: list[float], kind: type) -> None:
    given_values = np.array([values]).astype(kind)
    scaled, _ = scaled_to_8_bits(given_values, None)
    order = np.argsort(given_values[0], kind="stable")
    assert (np.diff(scaled[0][order].astype(int)) >= 0).all()
    # Nothing but the largest value (or what rounds to it) is white.
    white = given_values[scaled == 255]
    top = float(given_values.max())
    bottom = min(0.0, float(given_values.min()))
    assert all(value >= bottom + (top - bottom) * 0.997 for value in white.astype(float))


@pytest.mark.parametrize(
    ("values", "expected", "noted"),
    [
        (np.float32([[0, 0.5, 1]]), [0, 128, 255], False),
        (np.float32([[0, 2, 4]]), [0, 128, 255], True),
        (np.float32([[-1, 0, 1]]), [0, 128, 255], True),
        (np.float32([[np.nan, np.inf, 1]]), [0, 255, 255], False),
        (np.float32([[np.nan, np.inf, -np.inf, 0.5, 0.25]]), [0, 128, 64, 128, 64], False),
        (np.int32([[0, 100, 200]]), [0, 100, 200], False),
        (np.int32([[0, 257, 65535]]), [0, 1, 255], False),
        (np.int32([[0, 50000, 100000]]), [0, 128, 255], True),
    ],
)
def test_values_without_a_depth_take_the_smallest_scale_that_holds_them(
    values: np.ndarray, expected: list[int], noted: bool
) -> None:
    scaled, note = scaled_to_8_bits(values, None)
    assert scaled[0].tolist() == expected
    assert (note is not None) == noted


def test_a_tiff_of_floats_is_measured_by_its_values() -> None:
    ramp = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    decoded = decode_rgb(encoded(Image.fromarray(ramp), "TIFF"))
    np.testing.assert_array_equal(decoded.pixels[..., 0], np.rint(ramp * 255))
    assert decoded.header.bit_depth == 32


def test_a_tiff_without_a_finite_value_is_no_black_picture() -> None:
    for value in (np.nan, np.inf):
        nothing = Image.fromarray(np.full((4, 6), value, np.float32))
        with pytest.raises(ImageUndecodable, match=r"^cannot decode: no pixel is a finite number$"):
            decode_rgb(encoded(nothing, "TIFF"))


@pytest.mark.parametrize(
    ("image", "kind", "bits"),
    [
        (photo(), "JPEG", 8),
        (photo("1"), "PNG", 1),
        (photo("1"), "TIFF", 1),
        (photo().quantize(4), "PNG", 8),
        (photo(), "AVIF", 8),
        (photo(), "TIFF", 8),
    ],
)
def test_the_depth_is_that_of_the_file(image: Image.Image, kind: str, bits: int) -> None:
    assert read_header(encoded(image, kind)).bit_depth == bits


def test_sixteen_bit_colour_says_its_depth() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
    decoded = decode_rgb(data + chunk(b"IEND", b""))
    assert decoded.header.bit_depth == 16
    assert np.abs(decoded.pixels - values / 257).max() < 1


def test_a_white_is_zero_tiff_is_not_a_negative() -> None:
    values = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    with Image.open(io.BytesIO(data)) as image:
        photometric = image.tag_v2[262]
    expected = np.rint(values / 257)
    pixels = decode_rgb(data).pixels[..., 0]
    np.testing.assert_array_equal(pixels, 255 - expected if photometric == 0 else expected)
    assert photometric == 0
