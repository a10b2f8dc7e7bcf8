"""Heads of a C2PA manifest's boxes, which neither a hash nor the signature covers.

A manifest store is nested JUMBF boxes (ISO/IEC 19566-5): length, type, content; a superbox begins
with a description that ends in its label. PNG holds the store in a chunk of its own, WebP in a
chunk of RIFF, JPEG in APP11 segments (marker, length, "JP", box instance, packet number, and in
packets after the first the store's length and type again).
"""

from __future__ import annotations

from collections.abc import Iterator

_LABELS = ("c2pa.assertions", "c2pa.claim.v2", "c2pa.signature")
"""Of the superboxes of a manifest, in the order in which our signing leaves them."""
_PACKET = b"JP\x02\x11"
"""Common identifier and the box instance that the reference library writes."""
_APP11, _SOS = 0xEB, 0xDA
_DESCRIPTION = 17
"""Bytes of a description before its label: a UUID and the toggles."""
_RESERVED = 0xE0
"""Bits of the toggles that mean nothing yet and are zero."""
# The text "pad" and the head of a byte string whose length has two bytes (RFC 8949).
_PAD = b"\x63pad\x59"
_NULL = 0xF6
"""The payload of a detached COSE signature."""


def is_as_signed(data: bytes) -> bool:
    """Whether the heads of a signed picture's manifest are as signing left them.

    Args:
        data: a whole PNG, JPEG or WebP file with a manifest that was read and that holds.
    """
    try:
        store = _store(data)
        return store is not None and _has_own_heads(store) and _padding_is_empty(store)
    except (IndexError, ValueError):
        return False


def _store(data: bytes) -> bytes | None:
    """The manifest store; None where the container's own bytes around it are not right."""
    if data[:2] == b"\xff\xd8":
        return _of_jpeg(data)
    if data[8:12] == b"WEBP":
        return _of_webp(data)
    place = data.index(b"caBX")
    return data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")]


def _of_jpeg(data: bytes) -> bytes | None:
    packets = []
    place = 2
    while data[place] == 0xFF and data[place + 1] != _SOS:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == _APP11:
            packets.append(data[place + 4 : place + 2 + length])
        place += 2 + length
    store = b""
    for number, packet in enumerate(packets, start=1):
        if packet[:8] != _PACKET + number.to_bytes(4, "big"):
            return None
        if number > 1 and packet[8:16] != store[:8]:
            return None
        store += packet[8 if number == 1 else 16 :]
    return store or None


def _of_webp(data: bytes) -> bytes | None:
    place = 12
    while place < len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"C2PA":
            return data[place + 8 : place + 8 + length]
        # Chunks begin at even places.
        place += 8 + length + length % 2
    return None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of boxes that fill `content` exactly.

    Raises:
        ValueError: they do not.
    """
    place = 0
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if length < 8 or place + length > len(content):
            raise ValueError(f"box of {length} bytes at {place}")
        yield content[place + 4 : place + 8], content[place + 8 : place + length]
        place += length


def _superbox(kind: bytes, content: bytes) -> tuple[str, list[tuple[bytes, bytes]]]:
    """(label, boxes behind the description) of a superbox.

    Raises:
        ValueError: it is none.
    """
    (first, described), *inner = _boxes(content)
    if (kind, first) != (b"jumb", b"jumd"):
        raise ValueError(f"{kind!r} with {first!r} in it")
    if described[_DESCRIPTION - 1] & _RESERVED:
        raise ValueError("reserved toggles of a description are set")
    return described[_DESCRIPTION:].partition(b"\0")[0].decode("utf-8"), inner


def _has_own_heads(store: bytes) -> bool:
    ((kind, content),) = _boxes(store)
    name, manifests = _superbox(kind, content)
    if name != "c2pa" or len(manifests) != 1:
        return False
    _, parts = _superbox(*manifests[0])
    found = [_superbox(*part) for part in parts]
    if tuple(label for label, _ in found) != _LABELS:
        return False
    statements = [_superbox(*one) for one in found[0][1]]
    return all(inner for _, inner in (*statements, *found[1:]))


def _padding_is_empty(store: bytes) -> bool:
    """COSE signs neither its unprotected header nor the zeros that fill it up (`pad`)."""
    start = store.rfind(_PAD)
    if start < 0:
        return False
    begin = start + len(_PAD)
    end = begin + 2 + int.from_bytes(store[begin : begin + 2], "big")
    return not any(store[begin + 2 : end]) and store[end] == _NULL
