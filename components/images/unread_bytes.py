"""What bytes are that the decoder knows no picture in: of another kind, or broken at the start.

"Not an image" helps nobody who looks at a folder of ten thousand files: a page that a server sent
instead of the photograph, a video, a raw file and a photograph that is cut need different remedies.
Told by the first bytes alone; nothing is unpacked or run.
"""

from __future__ import annotations

import codecs
import io
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from components.images.png_chunks import SIGNATURE, check_chunks, find_chunk

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "PDF document"),
    (b"%!PS-Adobe", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "Photoshop document: export a picture"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000: convert it"),
    (b"\xff\x4f\xff\x51", "JPEG 2000: convert it"),
    (b"FUJIFILMCCD-RAW", "camera raw: develop it"),
    (b"IIRO", "camera raw: develop it"),
    (b"IIU\0", "camera raw: develop it"),
    (b"FOVb", "camera raw: develop it"),
    (b"\0\0\1\0", "icon"),
    (b"#?RADIANCE", "Radiance HDR: convert it"),
    (b"v/1\1", "OpenEXR: convert it"),
    (b"DDS ", "texture (DDS): convert it"),
    (b"gimp xcf", "GIMP document: export a picture"),
    (b"\0\5\x16\7", "what macOS keeps beside a file of that name (AppleDouble)"),
    (b"PK\3\4", "archive (ZIP): unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "archive (7z): unpack it"),
    (b"Rar!\x1a\7", "archive (RAR): unpack it"),
    (b"\x1f\x8b", "compressed (gzip): unpack it"),
    (b"BZh", "compressed (bzip2): unpack it"),
    (b"\xfd7zXZ\0", "compressed (xz): unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd): unpack it"),
    (b"\x1a\x45\xdf\xa3", "video"),
    (b"OggS", "video or sound"),
    (b"FLV\1", "video"),
    (b"ID3", "sound"),
    (b"version https://git-lfs", "pointer of Git LFS, not the file: `git lfs pull` brings it"),
    (b"version https://hawser", "pointer of Git LFS, not the file: `git lfs pull` brings it"),
    (b"data:image/", "base64 text: decode it"),
    # What the first bytes of a JPEG, a PNG and a GIF become.
    (b"/9j/", "base64 text: decode it"),
    (b"iVBORw0KGgo", "base64 text: decode it"),
    (b"\xef\xbf\xbd" * 3, "bytes that were saved as text and cannot be brought back"),
    (b"\xef\xbf\xbdPNG", "bytes that were saved as text and cannot be brought back"),
    (b"\x89PNG\n", "PNG that was sent as text: its line ends are changed"),
    (b"\x89PNG\r\r\n", "PNG that was sent as text: its line ends are changed"),
)
_VIDEO_BRANDS = (b"isom", b"iso2", b"mp4", b"avc1", b"qt  ", b"M4V", b"3gp", b"dash", b"MSNV")
_RAW_BRANDS = (b"crx ",)
_RIFF_KINDS = {b"AVI ": "video", b"WAVE": "sound"}
_TEXT_SEARCHED = 4096
_MARKUP = re.compile(
    r"\s*(?:<\?xml.*?\?>|<!--.*?-->|\s)*<(!doctype\s+)?(?P<name>[a-z][\w:]*)",
    re.DOTALL | re.IGNORECASE,
)
_CUT, _HEADER = "{} that ends before its pixels", "{} with a damaged header"
_CUT_WITHIN = "{} that ends early"
_JPEG_BITS = 8
_JPEG = b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RAW_MARK = slice(8, 10)
_DNG_VERSION, _SUBFILE, _REDUCED = 50706, 254, 1
_HEADER_BYTES, _BIG_HEADER_BYTES, _BIG_TIFF = 8, 16, 43
_BIG_ENDIAN_BIG_TIFF = b"MM\0+"
# Tags of TIFF 6.0, section 8 and "sample format".
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _CHANNELS = 256, 257, 258, 259, 262, 277
_SAMPLE_FORMAT, _FRACTIONS = 339, 3

# Frames of ITU-T T.81, table B.1, that baseline and progressive decoders do not read.
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_HIERARCHICAL = (0xC5, 0xC6, 0xCD, 0xCE)
_FRAME_OF_JPEG_LS = 0xF7
_FRAMES = frozenset({*range(0xC0, 0xD0), _FRAME_OF_JPEG_LS} - {0xC4, 0xC8, 0xCC})
_SCAN, _END = 0xDA, 0xD9
_WITHOUT_LENGTH = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})


def what_it_is(data: bytes) -> str | None:
    """A few words for bytes that are no readable picture, or None: they look like nothing known.

    Args:
        data: the file, not empty.
    """
    for look in (_picture, _by_start, _container, _text):
        if (found := look(data)) is not None:
            return found
    return "zero bytes alone" if not data.strip(b"\0") else None


def _by_start(data: bytes) -> str | None:
    if data.startswith(_TIFF) and data[_RAW_MARK] == b"CR":
        return "camera raw: develop it"
    return next((name for start, name in _STARTS if data.startswith(start)), None)


def _container(data: bytes) -> str | None:
    if data[:4] == b"RIFF":
        return _RIFF_KINDS.get(data[8:12])
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand.startswith(_VIDEO_BRANDS):
            return "video"
        return "camera raw: develop it" if brand in _RAW_BRANDS else None
    return "video" if data[4:8] in (b"moov", b"mdat") else None


def _text(data: bytes) -> str | None:
    """Markup by its first element; other text if it can be printed."""
    start = data[:_TEXT_SEARCHED]
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
    try:
        text = decoder.decode(start)
    except UnicodeDecodeError:
        return None
    found = _MARKUP.match(text)
    name = found["name"].lower() if found else ""
    if name in ("html", "head", "body"):
        return "HTML page"
    if name == "svg":
        return "SVG drawing: vectors, no pixels"
    if text.strip() and all(char.isprintable() or char.isspace() for char in text):
        return "text"
    return None


def _picture(data: bytes) -> str | None:
    """Formats that the decoder reads, and why not this file."""
    if (flaw := known_flaw(data)) is not None:
        return flaw
    starts = {"JPEG": (_JPEG,), "GIF": (b"GIF87a", b"GIF89a"), "TIFF": _TIFF, "BMP": (b"BM",)}
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _HEADER.format("WebP")
    if data[_RAW_MARK] == b"CR":
        return None
    if data.startswith(_TIFF) and (kind := _tiff(data)) is not None:
        return kind
    return next((_HEADER.format(n) for n, start in starts.items() if data.startswith(start)), None)


def known_flaw(data: bytes) -> str | None:
    """What is wrong with a file of a known format, where a decoder only says that it failed.

    Args:
        data: the file.
    """
    if data.startswith(SIGNATURE):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        cut = int.from_bytes(data[4:8], "little") + 8 > len(data)
        return _CUT_WITHIN.format("WebP") if cut else None
    return None


def raw_of_a_camera(data: bytes, tags: Mapping[int, Any]) -> bool:
    """Whether a TIFF is the negative of a camera, of which decoders show the small preview.

    Args:
        data: the file.
        tags: of its first directory.
    """
    reduced = tags.get(_SUBFILE, 0)
    preview = isinstance(reduced, int) and bool(reduced & _REDUCED)
    return data[_RAW_MARK] == b"CR" or _DNG_VERSION in tags or preview


def _tiff(data: bytes) -> str | None:
    """Samples and compression of a TIFF whose directory can be read, None where it cannot."""
    from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

    if data.startswith(_BIG_ENDIAN_BIG_TIFF):
        return "big-endian BigTIFF: convert it"
    file = io.BytesIO(data)
    try:
        head = file.read(_HEADER_BYTES)
        if head[2] == _BIG_TIFF:
            head += file.read(_BIG_HEADER_BYTES - _HEADER_BYTES)
        directory = ImageFileDirectory_v2(head)
        file.seek(directory.next)
        with warnings.catch_warnings():
            # Of a directory that is cut; what it lacks is seen below.
            warnings.simplefilter("ignore")
            directory.load(file)
        found = {tag: directory[tag] for tag in directory}
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return None
    if not {_WIDTH, _HEIGHT, _PHOTOMETRIC} <= set(found):
        return None
    bits = found.get(_BITS, (1,))
    channels = found.get(_CHANNELS, len(bits))
    fractions = _FRACTIONS in found.get(_SAMPLE_FORMAT, ())
    samples = f"{channels} x {'/'.join(map(str, sorted(set(bits))))}-bit "
    samples += "fractions" if fractions else "numbers"
    code = found.get(_COMPRESSION, 1)
    packed = "" if code in COMPRESSION_INFO else f", compression {code}"
    return f"TIFF of {samples}, photometric {found[_PHOTOMETRIC]}{packed}: convert it"


def _png(data: bytes) -> str | None:
    checked = check_chunks(data)
    if checked.damage is not None:
        return checked.damage
    head = find_chunk(data, b"IHDR")
    if head is not None and (not any(head[:4]) or not any(head[4:8])):
        width, height = (int.from_bytes(head[at : at + 4], "big") for at in (0, 4))
        return f"PNG of {height}x{width} pixels"
    return None if find_chunk(data, b"IDAT") is not None else _CUT.format("PNG")


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of the segments of a JPEG before its pixels (ITU-T T.81, B.1.1)."""
    at = 2
    while at + 2 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        end = at + 2
        if marker not in _WITHOUT_LENGTH:
            end += int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, data[at + 4 : end]
        if marker in (_SCAN, _END):
            return
        at = end


def _jpeg(data: bytes) -> str | None:
    segments = list(_segments(data))
    if all(marker != _SCAN for marker, _ in segments):
        return _CUT.format("JPEG")
    frame = next(((m, c) for m, c in segments if m in _FRAMES and len(c) >= 5), None)
    if frame is None:
        return None
    marker, content = frame
    height, width = (int.from_bytes(content[at : at + 2], "big") for at in (1, 3))
    if marker == _FRAME_OF_JPEG_LS:
        return "JPEG-LS: convert it"
    if marker in _LOSSLESS:
        return "lossless JPEG: convert it"
    if marker in _HIERARCHICAL:
        return "hierarchical JPEG: convert it"
    if content[0] != _JPEG_BITS:
        return f"JPEG of {content[0]} bits a channel, of which {_JPEG_BITS} are read: convert it"
    return None if height and width else f"JPEG of {height}x{width} pixels"
