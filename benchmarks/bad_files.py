"""Files that are wrong in every way we know, and some that only look so.

    python benchmarks/bad_files.py FOLDER

writes them below FOLDER, 12 of each kind, the same bytes every time. The tests send them through
ingest and signals; `corpus_walkthrough.py` prints what each kind ends as.
"""

from __future__ import annotations

import argparse
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif"),
    *(".avif", ".jxl", ".heic", ".heif"),
)
PER_KIND = 12
Rng = np.random.Generator
Make = Callable[[Rng], bytes]


def picture(rng: Rng, mode: str = "RGB") -> Image.Image:
    height, width = (int(edge) for edge in rng.integers(40, 90, 2))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(rng: Rng, **options: object) -> bytes:
    return encoded(picture(rng), "JPEG", quality=90, **options)


def cut(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(1, len(data) - 1))]


def flipped(data: bytes, rng: Rng) -> bytes:
    damaged = bytearray(data)
    for place in rng.integers(20, len(data), 8):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(rng: Rng) -> bytes:
    """A header of gigapixels over a few bytes."""
    edge = int(rng.integers(20_000, 2**31 - 1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def png_text_bomb(rng: Rng) -> bytes:
    """Compressed text of 80 MB in an otherwise good file."""
    data = encoded(picture(rng), "PNG")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000 + int(rng.integers(9)))))
    return data[:33] + text + data[33:]


def tiff_offsets(rng: Rng) -> bytes:
    """The directory points anywhere, also to itself."""
    data = bytearray(encoded(picture(rng), "TIFF"))
    data[4:8] = struct.pack("<I", int(rng.choice([4, 8, len(data) - 3, 2**31, 2**32 - 1])))
    return bytes(data)


def tiff_fields(rng: Rng) -> bytes:
    """Offsets and counts of the directory's fields are nonsense."""
    data = bytearray(encoded(picture(rng), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    for _ in range(4):
        place = start + 2 + 12 * int(rng.integers(8)) + int(rng.choice([4, 8]))
        data[place : place + 4] = rng.bytes(4)
    return bytes(data)


def animated(kind: str) -> Make:
    def make(rng: Rng) -> bytes:
        frames = [picture(rng).resize((50, 40)) for _ in range(3)]
        return encoded(frames[0], kind, save_all=True, append_images=frames[1:])

    return make


def sixteen_bit(rng: Rng) -> bytes:
    return encoded(Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16)), "PNG")


def rotated(rng: Rng) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(2, 9))
    return jpeg(rng, exif=exif)


def huge_exif(rng: Rng) -> bytes:
    return jpeg(rng, exif=b"Exif\0\0" + rng.bytes(65_000))


def sized_zero(rng: Rng) -> bytes:
    data = bytearray(jpeg(rng))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", *rng.permutation([0, 50]))
    return bytes(data)


def avif(rng: Rng) -> bytes:
    return encoded(picture(rng), "AVIF", speed=10)


def jxl(rng: Rng) -> bytes:
    """Magic bytes of a bare codestream or of the container over noise."""
    start = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")[int(rng.integers(2))]
    return start + rng.bytes(500)


def heif(rng: Rng) -> bytes:
    """A file type box of HEIF over noise."""
    brand = bytes(rng.choice([b"heic", b"heix", b"mif1"]))
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + rng.bytes(500)


# Name -> (ending, bytes of one file). More than one ending: taken in turn.
KINDS: dict[str, tuple[tuple[str, ...], Make]] = {
    "jpeg cut": ((".jpg",), lambda rng: cut(jpeg(rng), rng)),
    "jpeg flipped": ((".jpg",), lambda rng: flipped(jpeg(rng), rng)),
    "jpeg trailing garbage": ((".jpg",), lambda rng: jpeg(rng) + rng.bytes(500)),
    "jpeg progressive cut": ((".jpg",), lambda rng: cut(jpeg(rng, progressive=True), rng)),
    "jpeg without size": ((".jpg",), sized_zero),
    "jpeg head alone": ((".jpg",), lambda rng: b"\xff\xd8\xff" + rng.bytes(2)),
    "png cut": ((".png",), lambda rng: cut(encoded(picture(rng), "PNG"), rng)),
    "png flipped": ((".png",), lambda rng: flipped(encoded(picture(rng), "PNG"), rng)),
    "webp cut": ((".webp",), lambda rng: cut(encoded(picture(rng), "WEBP"), rng)),
    "tiff cut": ((".tif",), lambda rng: cut(encoded(picture(rng), "TIFF"), rng)),
    "tiff offsets": ((".tif",), tiff_offsets),
    "tiff fields": ((".tiff",), tiff_fields),
    "avif": ((".avif",), avif),
    "avif cut": ((".avif",), lambda rng: cut(avif(rng), rng)),
    "avif flipped": ((".avif",), lambda rng: flipped(avif(rng), rng)),
    "avif head alone": ((".avif",), lambda rng: avif(rng)[:32] + rng.bytes(300)),
    "avif in disguise": ((".jpg", ".heic"), avif),
    "jxl of noise": ((".jxl", ".jpg"), jxl),
    "heif of noise": ((".heic", ".heif"), heif),
    "gif cut": ((".gif",), lambda rng: cut(encoded(picture(rng, "P"), "GIF"), rng)),
    "empty": (EXTENSIONS, lambda rng: b""),
    "zero bytes": (EXTENSIONS, lambda rng: bytes(int(rng.integers(1, 5000)))),
    "noise": (EXTENSIONS, lambda rng: rng.bytes(int(rng.integers(1, 5000)))),
    "text": (EXTENSIONS, lambda rng: f"<html>{rng.integers(10**9)}</html>".encode()),
    "postscript": (
        (".jpg",),
        lambda rng: b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 50 %d\n" % rng.integers(9, 99),
    ),
    "wrong ending": ((".png", ".tif"), jpeg),
    "png bomb": ((".png",), png_bomb),
    "png text bomb": ((".png",), png_text_bomb),
    "cmyk": ((".jpg",), lambda rng: encoded(picture(rng, "CMYK"), "JPEG")),
    "16 bit": ((".png",), sixteen_bit),
    "palette": ((".png",), lambda rng: encoded(picture(rng, "P"), "PNG")),
    "1 bit": ((".png", ".tif"), lambda rng: encoded(picture(rng, "1"), "PNG")),
    "alpha": ((".png", ".webp"), lambda rng: encoded(picture(rng, "RGBA"), "PNG")),
    "gray with alpha": ((".png",), lambda rng: encoded(picture(rng, "LA"), "PNG")),
    "animated gif": ((".gif",), animated("GIF")),
    "animated webp": ((".webp",), animated("WEBP")),
    "rotated by exif": ((".jpg",), rotated),
    "huge exif": ((".jpg",), huge_exif),
    "broken icc": ((".jpg",), lambda rng: jpeg(rng, icc_profile=rng.bytes(3000))),
    "one pixel": ((".png",), lambda rng: encoded(picture(rng).resize((1, 1)), "PNG")),
    "one line": ((".jpg",), lambda rng: encoded(picture(rng).resize((300, 1)), "JPEG")),
}


def make_files(photos: Path) -> dict[str, str]:
    """Kind by file below `photos`, without the file system's own tricks."""
    kinds: dict[str, str] = {}
    for number, (kind, (endings, make)) in enumerate(KINDS.items()):
        folder = photos / kind.replace(" ", "-")
        folder.mkdir(parents=True)
        for n in range(PER_KIND):
            path = folder / f"{n:02}{endings[n % len(endings)]}"
            path.write_bytes(make(np.random.default_rng([number, n])))
            kinds[path.relative_to(photos).as_posix()] = kind
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description="Write files that are wrong in known ways.")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists; name a new folder")
    kinds = make_files(folder)
    print(f"{len(kinds)} files of {len(KINDS)} kinds below {folder}")


if __name__ == "__main__":
    main()
