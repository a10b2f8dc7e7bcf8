"""Chunks of a PNG file: what is damaged in the pixels, and what beside them can be left out.

Decoders refuse a whole picture for one comment with a wrong checksum. Here the two are told apart:
chunks that make pixels (critical ones, and `tRNS`) must be whole; any other is left out when it is
broken, and named. Source: PNG, 3rd edition (W3C 2025), sections 5.3 (layout) and 5.4 (names).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Length, name and checksum.
_FRAME_BYTES = 12
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_LOOK = (b"cICP", b"iCCP", b"eXIf", b"sRGB", b"gAMA", b"cHRM")
"""Beside the pixels, what decides how the picture is seen."""


@dataclass(frozen=True)
class Chunk:
    """One chunk; the places are in bytes from the start of the file."""

    name: bytes
    start: int
    """Of its length field."""
    end: int
    """One past its checksum; beyond the file's end where the chunk is cut."""

    @property
    def makes_pixels(self) -> bool:
        """Whether pixels depend on it: critical by its name's first letter, or transparency."""
        return self.name[:1].isupper() or self.name == b"tRNS"


@dataclass(frozen=True)
class ChunkCheck:
    """What a walk over all chunks found."""

    damage: str | None
    """Why the pixels cannot be trusted, or None."""
    notes: tuple[str, ...]
    """What is wrong beside the pixels."""
    sound: bytes
    """The file without what is wrong; the same object when nothing is."""


def chunks(data: bytes) -> Iterator[Chunk]:
    """Chunks in order up to IEND, the last perhaps cut; ends where bytes are no chunk."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if not name.isalpha():
            return
        chunk = Chunk(name, at, at + _FRAME_BYTES + length)
        yield chunk
        if name == b"IEND":
            return
        at = chunk.end


def _content(data: bytes, chunk: Chunk) -> bytes:
    return data[chunk.start + 8 : chunk.end - 4]


def find_chunk(data: bytes, name: bytes) -> bytes | None:
    """Content of the first whole chunk of that name, also behind the pixels."""
    for chunk in chunks(data):
        if chunk.name == name and _is_whole(data, chunk):
            return _content(data, chunk)
    return None


def _is_whole(data: bytes, chunk: Chunk) -> bool:
    if chunk.end > len(data):
        return False
    (expected,) = struct.unpack_from(">I", data, chunk.end - 4)
    return zlib.crc32(memoryview(data)[chunk.start + 4 : chunk.end - 4]) == expected


def _joined(data: bytes, kept: list[Chunk]) -> bytes:
    return SIGNATURE + b"".join(data[chunk.start : chunk.end] for chunk in kept)


def check_chunks(data: bytes) -> ChunkCheck:
    """Read every checksum: about 1 GB/s, little beside inflating the pixels.

    Args:
        data: a whole PNG file.
    """
    kept: list[Chunk] = []
    left_out: dict[str, None] = {}
    damage: str | None = None
    ended = False
    for chunk in chunks(data):
        ended = chunk.name == b"IEND"
        if _is_whole(data, chunk):
            kept.append(chunk)
            if chunk.name[:1].isupper() and chunk.name not in _PIXELS:
                # Such as Apple's CgBI, under which nothing means what it says.
                damage = damage or f"PNG chunk {chunk.name.decode()}: critical, and of no standard"
        elif chunk.makes_pixels:
            what = "cut" if chunk.end > len(data) else "wrong checksum"
            damage = damage or f"PNG chunk {chunk.name.decode()}: {what}"
            kept.append(chunk)
        else:
            left_out[f"broken PNG chunk {chunk.name.decode()} left out"] = None
    notes = (*left_out, *(() if ended else ("no end marker (IEND)",)))
    if not notes:
        return ChunkCheck(damage, (), data)
    return ChunkCheck(damage, notes, _joined(data, kept) + (b"" if ended else _END))


# Samples of a pixel by colour type; start and step of rows and columns in the seven passes of an
# interlaced file (PNG, sections 11.2.1 and 8.1).
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = (
    *((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2)),
    (1, 2, 0, 1),
)
_INFLATED_AT_ONCE = 2**20


def _raw_bytes(header: bytes) -> int:
    """Bytes of all rows with their filter types, by the content of IHDR."""
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    passes = _PASSES if interlaced else ((0, 1, 0, 1),)
    total = 0
    for top, down, left, right in passes:
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            total += rows * (1 + -(-columns * depth * _SAMPLES.get(colours, 1) // 8))
    return total


def missing_rows(data: bytes) -> bool:
    """Whether the compressed pixels end before the last row, which PIL paints over with zeros.

    Inflates them once more, in pieces that are thrown away.

    Args:
        data: a PNG file that PIL has decoded.
    """
    header = find_chunk(data, b"IHDR")
    assert header is not None
    left = _raw_bytes(header)
    inflater = zlib.decompressobj()
    try:
        for chunk in chunks(data):
            if chunk.name != b"IDAT":
                continue
            rest = _content(data, chunk)
            while rest and left > 0 and not inflater.eof:
                left -= len(inflater.decompress(rest, min(left, _INFLATED_AT_ONCE)))
                rest = inflater.unconsumed_tail
    except zlib.error:
        return True
    return left > 0


def without_extras(data: bytes, *, look: bool) -> bytes:
    """Only the whole chunks that make pixels, for decoders that stumble over another one.

    Args:
        data: a PNG file.
        look: keep colour profile and orientation, too.
    """
    wanted = _PIXELS + _LOOK * look
    kept = [c for c in chunks(data) if c.name in wanted and (c.makes_pixels or _is_whole(data, c))]
    return _joined(data, kept)
