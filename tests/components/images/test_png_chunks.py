from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from components.images.decoding import ImageUndecodable, decode_rgb, read_header
from components.images.png_chunks import check_chunks, chunks, find_chunk, missing_rows

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def png(**options: object) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "made by hand")
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG", pnginfo=text, **options)
    return buffer.getvalue()


def with_flip(data: bytes, name: bytes) -> bytes:
    """One bit of a chunk's content turned, its checksum as before."""
    place = data.index(name) + 6
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_chunks_are_listed_to_the_end() -> None:
    names = [chunk.name for chunk in chunks(png() + b"trailing garbage")]
    assert names[0] == b"IHDR"
    assert names[-1] == b"IEND"
    assert find_chunk(png(), b"tEXt") == b"Comment\0made by hand"
    assert find_chunk(png(), b"eXIf") is None


def test_a_sound_file_is_left_as_it_is() -> None:
    data = png()
    checked = check_chunks(data)
    assert (checked.damage, checked.notes) == (None, ())
    assert checked.sound is data


@pytest.mark.parametrize("name", [b"tEXt", b"iCCP", b"pHYs"])
def test_a_broken_ancillary_chunk_is_a_note(name: bytes) -> None:
    profile = b"".join([bytes([n]) for n in range(100)])
    data = with_flip(png(icc_profile=profile, dpi=(72, 72)), name)
    decoded = decode_rgb(data)
    np.testing.assert_array_equal(decoded.pixels, NOISE)
    assert decoded.integrity == "ok"
    assert f"broken PNG chunk {name.decode()} left out" in (decoded.note or "")
    # At ingest no pixel is read, and the file is one all the same.
    assert read_header(data).width == 60


def test_a_chunk_that_the_decoder_refuses_though_whole_is_left_out() -> None:
    data = png()
    content = b"\1"
    name = b"gAMA"
    block = struct.pack(">I", 1) + name + content + struct.pack(">I", zlib.crc32(name + content))
    decoded = decode_rgb(data[:33] + block + data[33:])
    np.testing.assert_array_equal(decoded.pixels, NOISE)
    assert "PNG chunks that the decoder refuses left out" in (decoded.note or "")


def test_a_missing_end_marker_is_a_note_when_all_pixels_are_there() -> None:
    decoded = decode_rgb(png()[:-12])
    np.testing.assert_array_equal(decoded.pixels, NOISE)
    assert (decoded.integrity, decoded.note) == ("ok", "no end marker (IEND)")


def test_damage_in_the_pixels_is_damage() -> None:
    # Stored blocks: a flipped bit is a wrong colour, and nothing else notices before the checksum.
    data = png(compress_level=0)
    place = data.index(b"IDAT") + 500
    damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    try:
        integrity = decode_rgb(damaged).integrity
    except ImageUndecodable as problem:
        integrity = str(problem)
    assert integrity != "ok"
    assert check_chunks(damaged).damage == "PNG chunk IDAT: wrong checksum"


def test_pixels_under_a_wrong_checksum_are_not_trusted() -> None:
    data = bytearray(png())
    data[data.index(b"IEND") - 5] ^= 1
    assert decode_rgb(bytes(data)).integrity == "PNG chunk IDAT: wrong checksum"


def test_broken_transparency_is_damage() -> None:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "PNG", transparency=(1, 2, 3))
    assert (
        check_chunks(with_flip(buffer.getvalue(), b"tRNS")).damage
        == "PNG chunk tRNS: wrong checksum"
    )


def test_pixels_that_are_cut_are_refused() -> None:
    data = png()
    with pytest.raises(ImageUndecodable, match="cannot decode"):
        decode_rgb(data[: data.index(b"IDAT") + 1000])


def by_hand(
    rows: bytes, *, depth: int = 8, colours: int = 2, interlaced: int = 0, size: tuple[int, int]
) -> bytes:
    """A PNG of these rows (filter types included) with right checksums."""

    def block(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    height, width = size
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    palette = block(b"PLTE", bytes(range(48))) if colours == 3 else b""
    pixels = block(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + palette + pixels + block(b"IEND", b"")


# Bytes of all rows, counted by hand. The interlaced one of 5x3: passes of 1x1, 1x1, none, 1x1 (rows
# x columns), 1x3, 2x2, and 1x5.
SHAPES = {
    "rgb": ({"size": (3, 5)}, 3 * (1 + 15)),
    "gray of 1 bit": ({"size": (3, 9), "depth": 1, "colours": 0}, 3 * (1 + 2)),
    "16 bits with alpha": ({"size": (2, 3), "depth": 16, "colours": 6}, 2 * (1 + 24)),
    "palette of 4 bits": ({"size": (4, 3), "depth": 4, "colours": 3}, 4 * (1 + 2)),
    "interlaced": (
        {"size": (3, 5), "colours": 0, "interlaced": 1},
        (1 + 1) + (1 + 1) + 0 + (1 + 1) + (1 + 3) + 2 * (1 + 2) + (1 + 5),
    ),
    # Passes of 1x1, none, 1x1, none, 1x1, none and 2x1; then of 1x1, 1x1, none, 1x1, none, 1x2 and
    # none.
    "interlaced, narrow": (
        {"size": (5, 1), "colours": 0, "interlaced": 1},
        (1 + 1) + 0 + (1 + 1) + 0 + (1 + 1) + 0 + 2 * (1 + 1),
    ),
    "interlaced, low": (
        {"size": (1, 5), "colours": 0, "interlaced": 1},
        (1 + 1) + (1 + 1) + 0 + (1 + 1) + 0 + (1 + 2) + 0,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_never_came_are_missing_to_the_byte(shape: str) -> None:
    options, total = SHAPES[shape]
    # Black to the end: what PIL leaves of missing rows looks the same.
    whole = by_hand(bytes(total), **options)  # type: ignore[arg-type]
    short = by_hand(bytes(total - 1), **options)  # type: ignore[arg-type]
    assert not missing_rows(whole)
    assert missing_rows(short)
    assert decode_rgb(whole).integrity == "ok"


def test_a_file_closed_properly_before_its_last_row_is_damaged_whatever_its_rows_hold() -> None:
    rows = b"".join(b"\0" + bytes([200 + n] * 15) for n in range(6))
    for count in range(1, 6):
        short = by_hand(rows[: 16 * count], size=(6, 5))
        assert decode_rgb(short).integrity == "PNG whose pixels end before the last row"
    assert decode_rgb(by_hand(rows, size=(6, 5))).integrity == "ok"


@pytest.mark.parametrize("height", [4, 5])
def test_an_interlaced_file_may_lack_its_odd_rows_alone(height: int) -> None:
    # (rows, columns) of the passes over a picture 4 wide; the last one brings every odd row whole.
    even = {4: [(1, 1), (1, 1), (1, 2), (2, 2)], 5: [(1, 1), (1, 1), (2, 1), (1, 2), (3, 2)]}
    passes = [*even[height], (2, 4)]
    rows = b"".join((b"\0" + b"\xc8" * columns) * count for count, columns in passes)
    size = {"size": (height, 4), "colours": 0, "interlaced": 1}
    whole = decode_rgb(by_hand(rows, **size))  # type: ignore[arg-type]
    assert (whole.integrity, whole.pixels.min()) == ("ok", 200)
    short = decode_rgb(by_hand(rows[:-5], **size))  # type: ignore[arg-type]
    assert short.integrity == "PNG whose pixels end before the last row"
    assert np.flatnonzero((short.pixels == 0).all(axis=(1, 2))).tolist() == [3]


def test_a_critical_chunk_of_no_standard_is_damage() -> None:
    data = png()
    block = (
        struct.pack(">I", 4) + b"CgBI" + bytes(4) + struct.pack(">I", zlib.crc32(b"CgBI\0\0\0\0"))
    )
    damage = check_chunks(data[:33] + block + data[33:]).damage
    assert damage == "PNG chunk CgBI: critical, and of no standard"
