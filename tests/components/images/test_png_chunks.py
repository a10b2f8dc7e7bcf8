from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from components.images.decoding import ImageUndecodable, decode_rgb, read_header
from components.images.png_chunks import check_chunks, chunks, find_chunk

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
