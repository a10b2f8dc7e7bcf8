"""JPEG with nothing painted over: pixels, or the first irregularity; a lost end is told apart.

libjpeg-turbo in strict mode stops where PIL goes on with gray. A file whose last two bytes are
missing, but no pixel, is whole all the same: libjpeg itself says so once they are put back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg

from components.images.arrays import ImageArray

END_OF_IMAGE = b"\xff\xd9"
NO_END = "no end marker (EOI)"
SCANS_MISSING = "progressive JPEG of which scans are missing"
_ENDS_EARLY = "premature end of jpeg file"
_START_OF_SCAN = 0xDA
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC)})
_PROGRESSIVE = (0xC2, 0xCA)
# Inside a scan 0xff is followed by 0 (stuffing), a restart marker or another 0xff (fill).
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass(frozen=True)
class JpegPixels:
    """What strict decoding gave."""

    pixels: ImageArray | None
    """(H, W, 3) RGB or (H, W, 4) CMYK with 255 full ink; None where `damage` is set."""
    damage: str | None
    note: str | None


def is_progressive(data: bytes) -> bool:
    """Whether the frame of a JPEG is a progressive one; reads its header alone."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES or marker == _START_OF_SCAN:
            return marker in _PROGRESSIVE
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def scans_are_complete(data: bytes) -> bool:
    """Whether the scans bring every coefficient of every component to full precision.

    A progressive file that is cut between two scans decodes without a word, only coarser. Reads
    the marker segments alone (ITU-T T.81, B.2).
    """
    left: dict[int, list[int | None]] = {}
    progressive = False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        segment = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        at += 4 + len(segment)
        if marker in _FRAMES and len(segment) >= 6:
            progressive = marker in _PROGRESSIVE
            left = {component: [None] * 64 for component in segment[6::3]}
        elif marker == _START_OF_SCAN and len(segment) >= 4:
            first, last, precision = segment[-3:]
            for component in segment[1 : 1 + 2 * segment[0] : 2]:
                known = left.get(component, [])
                band = range(first, min(last, 63) + 1) if progressive else range(64)
                for coefficient in band if known else ():
                    # The low half byte: how many low bits are still to come.
                    known[coefficient] = precision & 15 if progressive else 0
            found = _MARKER_AFTER_SCAN.search(data, at)
            at = found.start() if found else len(data)
    return bool(left) and all(set(bits) == {0} for bits in left.values())


def _strict(
    data: bytes, space: Literal["RGB", "CMYK"], buffer: np.ndarray | None
) -> ImageArray | str:
    """Pixels, or the message of the first irregularity that libjpeg-turbo reports."""
    try:
        pixels: ImageArray = simplejpeg.decode_jpeg(data, space, buffer=buffer, strict=True)
    except ValueError as problem:
        return " ".join(str(problem).split()).lower()
    return pixels


def decode_strictly(
    data: bytes, space: Literal["RGB", "CMYK"], buffer: np.ndarray | None = None
) -> JpegPixels:
    """Decode a JPEG file as libjpeg does; gray becomes RGB.

    Args:
        data: the file.
        space: RGB for pictures of one or three components, CMYK for four.
        buffer: memory for RGB pixels (None: new).
    """
    note = None
    found = _strict(data, space, buffer)
    if isinstance(found, str) and found == _ENDS_EARLY and scans_are_complete(data):
        again = _strict(data + END_OF_IMAGE, space, buffer)
        if not isinstance(again, str):
            found, note = again, NO_END
    elif not isinstance(found, str) and is_progressive(data) and not scans_are_complete(data):
        # Cut between two scans and closed again: libjpeg shows a coarse picture and is content.
        found = SCANS_MISSING
    if isinstance(found, str):
        return JpegPixels(None, found, None)
    # Four-component files hold inverted inks (Adobe's convention, which PIL assumes, too).
    return JpegPixels(255 - found if space == "CMYK" else found, None, note)
