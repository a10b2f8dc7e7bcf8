"""ICC profiles: what they are called, and the way from their colours to sRGB.

lcms2 through PIL, relative colorimetric with black point compensation. A profile that is sRGB by
its effect (no colour moves by more than one level) is not applied, so most photographs pay nothing.
Profiles repeat over a corpus, so what is made of one is kept. Where a file names its colours by
numbers instead (`cICP` of PNG, `nclx` of AVIF and HEIF; ITU-T H.273), a profile is made of them.
"""

from __future__ import annotations

import functools
import io
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from components.images.arrays import ImageArray

Colours = Literal["RGB", "L", "CMYK", "LAB"]
"""What the bands of a picture are, alpha aside."""

UNTAGGED = "untagged"
SRGB = "sRGB"
# Rounding in 8 bits; the usual sRGB profiles differ by as much among themselves.
_SAME_LEVELS = 1
_NAME_CHARS = 80
# Rows are converted in strips: PIL's own copies stay small beside the picture.
_STRIP_PIXELS = 2**20
_PROFILE_COLOURS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# Red, green and blue as XYZ adapted to D50, rows X, Y, Z (Skia's SkNamedGamut), by H.273 table 2.
_PRIMARIES = {
    1: (
        SRGB,
        (
            (0.436066, 0.385147, 0.143066),
            (0.222488, 0.716873, 0.060608),
            (0.013916, 0.097076, 0.714096),
        ),
    ),
    9: (
        "BT.2020",
        (
            (0.673459, 0.165661, 0.125100),
            (0.279033, 0.675338, 0.045629),
            (-0.001931, 0.029979, 0.797162),
        ),
    ),
    12: (
        "Display P3",
        (
            (0.515102, 0.291965, 0.157153),
            (0.241182, 0.692236, 0.066582),
            (-0.001049, 0.041882, 0.784378),
        ),
    ),
}
# Parameters g, a, b, c, d of ICC's curve of type 3 by H.273 table 3.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_CURVES = {
    4: ("gamma 2.2", (2.2, 1.0, 0.0, 0.0, 0.0)),
    5: ("gamma 2.8", (2.8, 1.0, 0.0, 0.0, 0.0)),
    8: ("linear", (1.0, 1.0, 0.0, 0.0, 0.0)),
    13: (SRGB, _SRGB_CURVE),
    # Of cameras: what is shown is meant to look as under sRGB, and viewers read it so.
    **dict.fromkeys((1, 6, 14, 15), ("BT.709", _SRGB_CURVE)),
}
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
_UNSPECIFIED = 2
_D50 = (0.9642, 1.0, 0.8249)
_PREFIX = {"RGB": "", "L": "Gray: ", "CMYK": "CMYK: ", "LAB": "Lab: "}


@dataclass(frozen=True)
class ColourReading:
    """How the bands of a picture become sRGB."""

    name: str
    """For the manifest: "sRGB", a profile's description, "untagged", "CMYK: ..."."""
    source: Colours | None = None
    """What the transform takes; None: there is nothing to do."""
    transform: ImageCms.ImageCmsTransform | None = None
    note: str | None = None
    """Why a profile is not applied."""


def _transform(profile: ImageCms.ImageCmsProfile, source: Colours) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        source,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _applied(pixels: ImageArray, source: Colours, how: ImageCms.ImageCmsTransform) -> ImageArray:
    image = Image.frombuffer(source, (pixels.shape[1], pixels.shape[0]), pixels)
    converted = ImageCms.applyTransform(image, how)
    assert converted is not None
    return np.asarray(converted)


def _changes_nothing(source: Colours, how: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform leaves a grid of colours and all grays where they are."""
    ramp = np.arange(256, dtype=np.uint8)[None]
    if source == "L":
        probes = [ramp]
    else:
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
        probes = [np.ascontiguousarray(grid), np.repeat(ramp[..., None], 3, axis=-1)]
    for probe in probes:
        expected = probe if probe.ndim == 3 else np.repeat(probe[..., None], 3, axis=-1)
        moved = np.abs(_applied(probe, source, how).astype(np.int16) - expected)
        if moved.max() > _SAME_LEVELS:
            return False
    return True


@functools.lru_cache(maxsize=64)
def colour_reading(icc: bytes, colours: Colours) -> ColourReading:
    """What a profile means for a picture of these bands; a broken or unfit one is not applied.

    Args:
        icc: the profile's bytes.
        colours: what the picture's bands are.
    """
    untagged = _PREFIX[colours] + UNTAGGED if colours == "CMYK" else UNTAGGED
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        kind = _PROFILE_COLOURS.get(profile.profile.xcolor_space.strip())
        described = profile.profile.profile_description or ""
        # Gray values read as red, green and blue alike, as browsers do.
        if kind != colours and not (kind == "RGB" and colours == "L"):
            note = f"colour profile for {profile.profile.xcolor_space.strip()} not applied"
            return ColourReading(untagged, note=note)
        source: Colours = "RGB" if kind == "RGB" else colours
        how = _transform(profile, source)
        same = source != "CMYK" and _changes_nothing(source, how)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return ColourReading(untagged, note="broken colour profile not applied")
    printable = "".join(c for c in described if c.isprintable()).strip()[:_NAME_CHARS]
    name = _PREFIX[source] + (printable or "unnamed profile")
    if same:
        return ColourReading(SRGB if source == "RGB" else name)
    return ColourReading(name, source, how)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _matrix_profile(
    name: str, rows: tuple[tuple[float, ...], ...], curve: tuple[float, ...]
) -> bytes:
    """An ICC profile of three primaries and one curve (ICC.1:2022, sections 7 to 10)."""
    text = name.encode("utf-16-be")
    described = struct.pack(">4s4xII4sII", b"mluc", 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": described, b"cprt": described, b"wtpt": b"XYZ \0\0\0\0" + _fixed(*_D50)}
    for channel, column in zip(b"rgb", zip(*rows, strict=True), strict=True):
        tags[bytes([channel]) + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(*column)
        tags[bytes([channel]) + b"TRC"] = b"para\0\0\0\0\0\3\0\0" + _fixed(*curve)
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12x4s", at + len(body), b"", 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    )
    return (head + bytes(28) + _fixed(*_D50)).ljust(128, b"\0") + table + body


@functools.cache
def coded_reading(primaries: int, transfer: int) -> ColourReading:
    """What the numbers of H.273 mean for a picture of red, green and blue (or gray).

    Args:
        primaries: ColourPrimaries.
        transfer: TransferCharacteristics.
    """
    if _UNSPECIFIED in (primaries, transfer):
        return ColourReading(UNTAGGED)
    if primaries not in _PRIMARIES or transfer not in _CURVES:
        gamut = _PRIMARIES.get(primaries, (f"primaries {primaries}",))[0]
        curve = _HIGH_RANGE.get(transfer, f"transfer {transfer}")
        name = f"{gamut}, {curve}"
        return ColourReading(name, note=f"colours of {name} not applied")
    (gamut, rows), (curve, parameters) = _PRIMARIES[primaries], _CURVES[transfer]
    name = gamut if parameters is _SRGB_CURVE else f"{gamut}, {curve}"
    found = colour_reading(_matrix_profile(name, rows, parameters), "RGB")
    assert found.note is None
    return found


@functools.cache
def lab_reading() -> ColourReading:
    """Lab pictures (D50) need no profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return ColourReading("Lab", "LAB", _transform(profile, "LAB"))


def to_srgb(pixels: ImageArray, reading: ColourReading) -> ImageArray:
    """Colours of a profile as sRGB.

    Args:
        pixels: (H, W[, C]) uint8 in the bands of `reading.source`.
        reading: one with a transform.

    Returns:
        (H, W, 3) uint8.
    """
    assert reading.transform is not None
    assert reading.source is not None
    height, width = pixels.shape[:2]
    converted = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = np.ascontiguousarray(pixels[top : top + rows])
        converted[top : top + rows] = _applied(strip, reading.source, reading.transform)
    return converted
