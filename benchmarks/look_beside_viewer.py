"""`ultraflux corpus look` beside a rendering that shares no code with it.

    python benchmarks/look_beside_viewer.py [PHOTO] [--sheet docs/images/look.jpg]

Makes PHOTO turned (EXIF 6), wide-gamut (Display P3 by a profile, and by the numbers of cICP), half
transparent and 16 bits deep, runs the command over the files, and renders each by OpenCV's decoders
and plain arithmetic: OpenCV turns by EXIF, P3 is brought to sRGB by its matrix and curve, alpha is
composited over white, 16 bits are divided by 257. The crop is cut by PIL, as the command does, so
that colours and not resampling are compared. Prints a table of differences: of 255 levels, and
CIE76. The last column is the difference of a rendering that ignores what is unusual about the file.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from icc_bytes import P3, rgb_profile
from PIL import Image, PngImagePlugin
from skimage.color import rgb2lab

ROOT = Path(__file__).resolve().parents[1]
LONG_EDGE_PX = 1200
CELL_PX = 216
GAMMA = 2.2
# Chromaticities of red, green and blue under D65.
SRGB_XY = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
P3_XY = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
WHITE_XY = (0.3127, 0.3290)


def to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    """(3, 3): linear colours to XYZ (SMPTE RP 177)."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in corners]).T
    x, y = WHITE_XY
    return columns * np.linalg.solve(columns, [x / y, 1.0, (1 - x - y) / y])


def from_p3(colours: np.ndarray, linear: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 of Display P3 as sRGB."""
    values = linear(colours / 255) @ to_xyz(P3_XY).T @ np.linalg.inv(to_xyz(SRGB_XY)).T
    values = values.clip(0, 1)
    low = values <= 0.0031308
    curved = np.where(low, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(np.uint8)


def srgb_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def decoded(data: bytes, flags: int) -> np.ndarray:
    """OpenCV's pixels, red first."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


Case = tuple[bytes, np.ndarray, np.ndarray]
"""File, what a viewer shows, and what is seen without the unusual."""


def cases(photo: Image.Image) -> dict[str, Case]:
    """By name, with its ending."""
    found: dict[str, Case] = {}
    plain = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(photo, "JPEG", quality=95, exif=turned)
    found["turned.jpg"] = (data, decoded(data, cv2.IMREAD_COLOR), decoded(data, plain))
    icc = rgb_profile("Display P3", P3, GAMMA)
    data = encoded(photo, "JPEG", quality=95, icc_profile=icc)
    stored = decoded(data, plain)
    # An ICC curve of one number has 8 bits behind the point.
    shown = from_p3(stored, lambda values: values ** (round(GAMMA * 256) / 256))
    found["wide-profile.jpg"] = (data, shown, stored)
    numbers = PngImagePlugin.PngInfo()
    numbers.add(b"cICP", bytes([12, 13, 0, 1]))
    data = encoded(photo, "PNG", pnginfo=numbers)
    found["wide-cicp.png"] = (data, from_p3(np.asarray(photo), srgb_linear), np.asarray(photo))
    clear = photo.convert("RGBA")
    clear.putalpha(Image.radial_gradient("L").resize(photo.size).point(lambda v: 255 - v))
    data = encoded(clear, "PNG")
    pixels = decoded(data, cv2.IMREAD_UNCHANGED).astype(np.float64)
    cover = pixels[..., 3:] / 255
    shown = np.rint(pixels[..., :3] * cover + 255 * (1 - cover)).astype(np.uint8)
    found["transparent.png"] = (data, shown, pixels[..., :3].astype(np.uint8))
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    deep += np.random.default_rng(0).integers(0, 100, deep.shape, dtype=np.uint16) * (deep < 65000)
    data = encoded(Image.fromarray(deep), "PNG")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    shown = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=-1)
    clipped = np.repeat(values.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    found["16-bit.png"] = (data, shown, clipped)
    return found


def cropped(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled until it covers (height, width), the middle kept."""
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    left, top = (pixels.shape[1] - width / scale) / 2, (pixels.shape[0] - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(small)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean of 255 levels, and mean CIE76."""
    levels = np.abs(first.astype(np.float64) - second).mean()
    return levels, float(np.linalg.norm(rgb2lab(first) - rgb2lab(second), axis=-1).mean())


def looked(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """What the command writes for each file."""
    out = folder / "look"
    # Nothing but the settings of this clone: no row of its manifest is of these files.
    subprocess.run(
        [
            *(sys.executable, "-m", "flows.cli", "corpus", "look"),
            *(str(folder / name) for name in names),
            *("--out", str(out)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    crops = {}
    for name in names:
        (path,) = out.glob(f"{Path(name).stem}-*.png")
        crops[name] = np.asarray(Image.open(path))
    return crops


def main() -> None:
    """Print the table and write the sheet: the command's crops, the other ones, the naive ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sample = ROOT / "data" / "sample" / "red-cherry-leaves.jpg"
    parser.add_argument("photo", type=Path, nargs="?", default=sample)
    parser.add_argument("--sheet", type=Path, help="JPEG to write")
    options = parser.parse_args()
    photo = Image.open(options.photo).convert("RGB")
    photo.thumbnail((LONG_EDGE_PX, LONG_EDGE_PX), Image.Resampling.LANCZOS)
    made = cases(photo)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, (data, _, _) in made.items():
            (folder / name).write_bytes(data)
        crops = looked(folder, list(made))
    print("| file | crop | levels of 255 | delta E | delta E if ignored |\n|---|---|---|---|---|")
    rows = []
    for name, (_, shown, ignored) in made.items():
        crop = crops[name]
        height, width = crop.shape[:2]
        beside, without = cropped(shown, height, width), cropped(ignored, height, width)
        levels, colour = difference(crop, beside)
        print(
            f"| {name} | {height}x{width} | {levels:.2f} | {colour:.2f} "
            f"| {difference(crop, without)[1]:.2f} |"
        )
        rows.append([crop, beside, without])
    if options.sheet is not None:
        step = CELL_PX + 8
        sheet = Image.new("RGB", (step * len(rows), step * 3), "gray")
        for column, row in enumerate(rows):
            for line, pixels in enumerate(row):
                cell = Image.fromarray(pixels)
                cell.thumbnail((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
                sheet.paste(cell, (column * step, line * step))
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(options.sheet, quality=85)


if __name__ == "__main__":
    main()
