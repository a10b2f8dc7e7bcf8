from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from components.corpus.sources.image_probe import image_extension
from components.images.image_containers import container_family


def box(major: bytes, *compatible: bytes) -> bytes:
    body = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"avif" * 4


@pytest.mark.parametrize(
    ("prefix", "family", "ending"),
    [
        (box(b"avif", b"mif1", b"miaf"), "AVIF", ".avif"),
        (box(b"mif1", b"avif"), "AVIF", ".avif"),
        (box(b"heic", b"mif1"), "HEIF", ".heic"),
        (box(b"mif1", b"heix"), "HEIF", ".heic"),
        (b"\xff\x0a" + bytes(30), "JXL", ".jxl"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(20), "JXL", ".jxl"),
        # A brand beyond the box is no brand; a video is no picture.
        (box(b"isom", b"mp41"), None, None),
        (b"", None, None),
        (b"\xff\xff\xff\xffftyp", None, None),
    ],
)
def test_containers_are_told_by_their_first_bytes(
    prefix: bytes, family: str | None, ending: str | None
) -> None:
    assert container_family(prefix) == family
    assert image_extension(prefix) == ending


def test_a_file_that_pil_wrote_is_avif() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "AVIF")
    assert container_family(file.getvalue()[:32]) == "AVIF"
