"""Makers of files that are wrong: a generator of random numbers in, the bytes of one file out."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

Rng = np.random.Generator
Make = Callable[[Rng], bytes]
_SIGNATURE_AND_HEADER = 33
"""Bytes of a PNG up to the end of IHDR."""


def picture(rng: Rng, mode: str = "RGB") -> Image.Image:
    height, width = (int(edge) for edge in rng.integers(40, 90, 2))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def made(kind: str, mode: str = "RGB", **options: object) -> Make:
    """A sound file of one format."""
    return lambda rng: encoded(picture(rng, mode), kind, **options)


def jpeg(rng: Rng, **options: object) -> bytes:
    return encoded(picture(rng), "JPEG", quality=90, **options)


png, tiff, avif = made("PNG"), made("TIFF"), made("AVIF", speed=10)


def cut(data: bytes, rng: Rng, after: int = 1) -> bytes:
    """The first bytes, at least `after` and at most all but two."""
    return data[: int(rng.integers(after, len(data) - 1))]


def flipped(data: bytes, rng: Rng, after: int = 20) -> bytes:
    damaged = bytearray(data)
    for place in rng.integers(after, len(data), 8):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut_in_header(data: bytes, pixels: bytes, rng: Rng) -> bytes:
    """A file that ends before its size is known."""
    return data[: int(rng.integers(8, data.index(pixels)))]


# JPEG


def scan_of(data: bytes) -> int:
    """Where the pixels of a JPEG begin: behind its first scan's header."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def jpeg_cut(rng: Rng, mode: str = "RGB", **options: object) -> bytes:
    data = made("JPEG", mode, quality=90, **options)(rng)
    # Blocks are missing, not only the padding of the last one.
    return data[: int(rng.integers(scan_of(data), len(data) - 200))]


def between_scans(rng: Rng) -> bytes:
    """A progressive file of which whole scans are missing, closed properly."""
    data = jpeg(rng, progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)][1:]
    return data[: starts[int(rng.integers(len(starts)))]] + b"\xff\xd9"


def overwritten(data: bytes, rng: Rng) -> bytes:
    """Markers of no meaning where blocks should be."""
    start = int(rng.integers(scan_of(data), len(data) - 200))
    return data[:start] + b"\xff\xc8\x00\x02" * 8 + data[start + 32 :]


def without_segment(marker: int) -> Make:
    """A JPEG less its segments of one kind."""

    def make(rng: Rng) -> bytes:
        data = jpeg(rng)
        at, kept = 2, data[:2]
        while data[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            kept += data[at:end] if data[at + 1] != marker else b""
            at = end
        return kept + data[at:]

    return make


def frame(rng: Rng, **changed: int) -> bytes:
    """A JPEG whose frame header says something else: marker, precision, height or width."""
    data = bytearray(jpeg(rng))
    start = data.index(b"\xff\xc0")
    data[start + 1] = changed.get("marker", 0xC0)
    data[start + 4] = changed.get("precision", 8)
    for offset, name in ((5, "height"), (7, "width")):
        if name in changed:
            data[start + offset : start + offset + 2] = struct.pack(">H", changed[name])
    return bytes(data)


def sized_zero(rng: Rng) -> bytes:
    height, width = (int(edge) for edge in rng.permutation([0, 50]))
    return frame(rng, height=height, width=width)


def exif(**tags: object) -> Make:
    def make(rng: Rng) -> bytes:
        block = Image.Exif()
        value = tags["orientation"]
        block[0x0112] = int(rng.integers(2, 9)) if value == "any" else value
        return jpeg(rng, exif=block)

    return make


def nonsense_exif(rng: Rng) -> bytes:
    """Right magic bytes, then a directory that points at itself and anywhere."""
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 60_000) + rng.bytes(400)
    return jpeg(rng, exif=block)


def mpo(rng: Rng) -> bytes:
    return encoded(picture(rng), "MPO", save_all=True, append_images=[picture(rng)])


def foreign_profile(rng: Rng) -> bytes:
    """A profile of Lab colours in a picture of red, green and blue."""
    return jpeg(rng, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())


# PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content)


def png_cut(rng: Rng) -> bytes:
    data = png(rng)
    return data[: int(rng.integers(data.index(b"IDAT") + 4, len(data) - 20))]


def png_flipped(rng: Rng) -> bytes:
    data = bytearray(png(rng))
    start = data.index(b"IDAT") + 4
    for place in rng.integers(start, len(data) - 16, 8):
        data[place] ^= 0x10
    return bytes(data)


def png_with(before_pixels: Callable[[Rng], bytes]) -> Make:
    """A PNG with another chunk in front of its pixels."""

    def make(rng: Rng) -> bytes:
        data = png(rng)
        extra = before_pixels(rng)
        return data[:_SIGNATURE_AND_HEADER] + extra + data[_SIGNATURE_AND_HEADER:]

    return make


def broken(kind: bytes) -> Callable[[Rng], bytes]:
    """A chunk with a wrong checksum."""
    return lambda rng: chunk(kind, rng.bytes(30))[:-1] + b"\x00"


def broken_palette(rng: Rng) -> bytes:
    data = bytearray(encoded(picture(rng, "P"), "PNG"))
    data[data.index(b"PLTE") + 4 + int(rng.integers(50))] ^= 0x40
    return bytes(data)


def broken_header(rng: Rng) -> bytes:
    data = bytearray(png(rng))
    data[_SIGNATURE_AND_HEADER - 1] ^= 0xFF
    return bytes(data)


def png_of(rows: int, width: int, content: Callable[[Rng], bytes]) -> Make:
    """Right header and checksums around pixels of our own."""
    end = chunk(b"IEND", b"")
    return lambda rng: header(width, 40) + chunk(b"IDAT", content(rng)) + end


def png_bomb(rng: Rng) -> bytes:
    """A header of gigapixels over a few bytes."""
    edge = int(rng.integers(20_000, 2**31 - 1))
    return header(edge, edge) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def text_bomb(rng: Rng) -> bytes:
    """Compressed text of 80 MB."""
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000 + int(rng.integers(9)))))


def half(rng: Rng) -> bytes:
    """The first rows of forty, closed properly."""
    return zlib.compress(b"".join(b"\0" + rng.bytes(150) for _ in range(int(rng.integers(1, 39)))))


def inflating(rng: Rng) -> bytes:
    """Pixels that inflate to a thousand times what the header needs."""
    return zlib.compress(b"\0" * (40 * 151 * 1000 + int(rng.integers(99))))


def sixteen_bit(rng: Rng) -> bytes:
    return encoded(Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16)), "PNG")


def sixteen_bit_colour(rng: Rng) -> bytes:
    rows = b"".join(b"\0" + rng.bytes(50 * 6) for _ in range(40))
    content = struct.pack(">IIBBBBB", 50, 40, 16, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# TIFF


def tiff_offsets(rng: Rng) -> bytes:
    """The directory points anywhere, also to itself."""
    data = bytearray(tiff(rng))
    data[4:8] = struct.pack("<I", int(rng.choice([4, len(data) - 3, 2**31, 2**32 - 1])))
    return bytes(data)


def tiff_fields(rng: Rng) -> bytes:
    """Offsets and counts of the directory's fields are nonsense."""
    data = bytearray(tiff(rng))
    start = struct.unpack("<I", data[4:8])[0]
    for _ in range(4):
        place = start + 2 + 12 * int(rng.integers(8)) + int(rng.choice([4, 8]))
        data[place : place + 4] = rng.bytes(4)
    return bytes(data)


def tiff_cut(rng: Rng) -> bytes:
    """PIL writes the directory first, so the pixels are what is missing."""
    data = tiff(rng)
    return data[: int(rng.integers(len(data) // 2, len(data) - 1))]


def values(make: Callable[[Rng], np.ndarray]) -> Make:
    return lambda rng: encoded(Image.fromarray(make(rng)), "TIFF")


def with_nan(rng: Rng) -> np.ndarray:
    numbers = rng.random((50, 60), dtype=np.float32)
    numbers[rng.integers(50), :] = np.nan
    return numbers


def camera_raw(rng: Rng) -> bytes:
    """A preview with the tags of a DNG: what PIL opens is not the photograph."""
    return encoded(picture(rng), "TIFF", tiffinfo={254: 1, 50706: b"\1\4\0\0"})


# Others


def animated(kind: str) -> Make:
    def make(rng: Rng) -> bytes:
        frames = [picture(rng).resize((50, 40)) for _ in range(3)]
        return encoded(frames[0], kind, save_all=True, append_images=frames[1:])

    return make


def jxl(rng: Rng) -> bytes:
    """Magic bytes of a bare codestream or of the container over noise."""
    start = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")[int(rng.integers(2))]
    return start + rng.bytes(500)


def box(*brands: bytes) -> Make:
    """A file type box over noise."""
    content = bytes(4).join([brands[0], b"".join(brands)])
    return lambda rng: struct.pack(">I", 8 + len(content)) + b"ftyp" + content + rng.bytes(500)


def heif(rng: Rng) -> bytes:
    brand = bytes(rng.choice([b"heic", b"heix", b"mif1"]))
    return box(brand, b"mif1")(rng)


def gif_cut(rng: Rng) -> bytes:
    data = encoded(picture(rng, "P"), "GIF")
    return cut(data, rng, len(data) // 2)


def webp_cut(rng: Rng) -> bytes:
    return cut(encoded(picture(rng), "WEBP"), rng, 40)


def over_noise(*starts: bytes) -> Make:
    """Magic bytes of something else over noise."""
    return lambda rng: starts[int(rng.integers(len(starts)))] + rng.bytes(600)


def document(*starts: str) -> Make:
    """Text that begins in one of several ways."""
    return lambda rng: (
        starts[int(rng.integers(len(starts)))] + f"\n<p>{rng.integers(10**9)}</p>\n" * 9
    ).encode()


def saved_as_text(rng: Rng) -> bytes:
    """A JPEG that went through a UTF-8 decoder."""
    return jpeg(rng).decode("utf-8", "replace").encode()


def sent_as_text(rng: Rng) -> bytes:
    """A PNG whose line ends were changed on the way."""
    return png(rng).replace(b"\r\n", b"\n")
