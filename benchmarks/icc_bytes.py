"""Colour profiles made by hand (ICC.1:2010), so that tests need none from elsewhere."""

from __future__ import annotations

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Chromaticities adapted to D50, as columns of XYZ: red, green, blue.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def _described(name: str) -> bytes:
    text = name.encode("ascii") + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50), b"cprt": b"text\0\0\0\0none\0", **tags}
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += padded
    head = struct.pack(
        ">I4s4s4s4s4s12s", at + len(body), b"none", b"\2\x10\0\0", kind, space, pcs, b""
    )
    head += b"acsp" + bytes(28) + b"".join(_fixed(value) for value in D50)
    return head + bytes(128 - len(head)) + table + body


def rgb_profile(name: str, columns: tuple[tuple[float, ...], ...], gamma: float = 2.2) -> bytes:
    """A matrix profile."""
    tags = {b"desc": _described(name)}
    for channel, column in zip("rgb", columns, strict=True):
        tags[f"{channel}XYZ".encode()] = _xyz(column)
        tags[f"{channel}TRC".encode()] = _gamma(gamma)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def gray_profile(name: str, gamma: float) -> bytes:
    """One tone curve."""
    tags = {b"desc": _described(name), b"kTRC": _gamma(gamma)}
    return _profile(b"mntr", b"GRAY", b"XYZ ", tags)


def cmyk_profile(name: str) -> bytes:
    """A table of 2^4 corners in Lab (lut8): inks that are less vivid than the plain conversion."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    cyan, magenta, yellow, black = corners.T
    lightness = (95 - 35 * cyan - 40 * magenta - 8 * yellow) * (1 - 0.8 * black)
    fade = 1 - 0.9 * black
    a = (-35 * cyan + 65 * magenta - 5 * yellow) * fade
    b = (-45 * cyan - 5 * magenta + 80 * yellow) * fade
    lab = np.stack([lightness * 2.55, a + 128, b + 128], axis=-1).clip(0, 255).round()
    identity = b"".join(_fixed(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4
    table += lab.astype(np.uint8).tobytes() + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"desc": _described(name), b"A2B0": table})
