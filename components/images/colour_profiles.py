"""ICC profiles: what they are called, and the way from their colours to sRGB.

lcms2 through PIL, relative colorimetric with black point compensation. A profile that is sRGB by
its effect (no colour moves by more than one level) is not applied, so most photographs pay nothing.
Profiles repeat over a corpus, so what is made of one is kept.
"""

from __future__ import annotations

import functools
import io
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
