"""What is read of unusual photographs beside what a viewer shows, and what asking costs the others.

    python benchmarks/pixel_policies.py [FOLDER] [--rounds 5]

The first table makes one photograph of FOLDER turned, wide-gamut, transparent, 16-bit and CMYK, and
gives the mean colour difference (CIE76) of both readings against an independent rendering: PIL's
exif_transpose, ImageCms, alpha_composite over white, and a division by 257.

The second part is the cost on plain JPEGs (upright, sRGB or untagged): CPU time of a row of the
signals stage with GLCM off, and of what the policy adds to it (orientation, profile, bit depth,
alpha, choice of one array), the fastest of the rounds for each file.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from icc_bytes import ADOBE, P3, cmyk_profile, rgb_profile
from PIL import Image, ImageCms, ImageOps
from skimage.color import rgb2lab

from components.images import header_facts
from components.images.decoding import decode_as_stored, decode_rgb, read_header
from components.signals.candidate import Candidate, measure_candidate, prepare_worker

ROOT = Path(__file__).resolve().parents[1]
LONG_EDGE_PX = 1024
BACKGROUND = "white"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def managed(image: Image.Image, icc: bytes) -> np.ndarray:
    """PIL's one-call colour management."""
    shown = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return np.asarray(shown)


def cases(photo: Image.Image) -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (file, what a viewer shows)."""
    found: dict[str, tuple[bytes, np.ndarray]] = {}
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(photo, "JPEG", quality=95, exif=turned)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found["turned (EXIF 6)"] = (data, np.asarray(shown))
    for name, columns, gamma in (("Adobe RGB (1998)", ADOBE, 563 / 256), ("Display P3", P3, 2.2)):
        icc = rgb_profile(name, columns, gamma)
        data = encoded(photo, "JPEG", quality=95, icc_profile=icc)
        found[name] = (data, managed(Image.open(io.BytesIO(data)), icc))
    clear = photo.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    white = Image.new("RGBA", photo.size, BACKGROUND)
    shown = Image.alpha_composite(white, clear).convert("RGB")
    found["half transparent"] = (encoded(clear, "PNG"), np.asarray(shown))
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 256 + 77
    gray = np.rint(deep / 257).astype(np.uint8)
    found["16-bit gray"] = (encoded(Image.fromarray(deep), "PNG"), np.stack([gray] * 3, axis=-1))
    icc = cmyk_profile("inks")
    inks = encoded(photo.convert("CMYK"), "JPEG", quality=95, icc_profile=icc)
    found["CMYK with a profile"] = (inks, managed(Image.open(io.BytesIO(inks)), icc))
    return found


def difference(shown: np.ndarray, pixels: np.ndarray) -> str:
    """Mean CIE76, or that it is another picture."""
    if shown.shape != pixels.shape:
        return f"lies on its side ({pixels.shape[1]}x{pixels.shape[0]})"
    return f"{np.linalg.norm(rgb2lab(shown) - rgb2lab(pixels), axis=-1).mean():.2f}"


def asked(data: bytes) -> None:
    """What the policy adds to an opened file."""
    image = OPENED[data]
    header_facts.orientation(image, data)
    header_facts.reading_of(image, header_facts.colours_of(image), data)
    header_facts.bit_depth(image, data)
    _ = image.has_transparency_data


OPENED: dict[bytes, Image.Image] = {}


def fastest(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "data" / "sample")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    files = sorted(options.folder.glob("*.jpg"))
    photo = Image.fromarray(decode_rgb(files[0].read_bytes()).pixels)
    photo.thumbnail((LONG_EDGE_PX, LONG_EDGE_PX))
    print("| photograph | a viewer shows | as stored, mean delta E | as seen, mean delta E |")
    print("|---|---|---|---|")
    for name, (data, shown) in cases(photo).items():
        size = f"{shown.shape[1]}x{shown.shape[0]}"
        stored = difference(shown, decode_as_stored(data).pixels)
        print(f"| {name} | {size} | {stored} | {difference(shown, decode_rgb(data).pixels)} |")
    prepare_worker()
    whole = policy = 0.0
    plain = 0
    for path in files:
        data = path.read_bytes()
        header = read_header(data)
        if header.orientation != 1 or header.color_space not in ("sRGB", "untagged"):
            continue
        plain += 1
        row = Candidate(path, 240, 800.0, LONG_EDGE_PX, 400.0, glcm=False)
        whole += fastest(lambda row=row: measure_candidate(row), options.rounds)
        costs = []
        for _ in range(20):
            # Opened anew: PIL keeps the EXIF that it has parsed.
            OPENED[data] = Image.open(io.BytesIO(data))
            costs.append(fastest(lambda data=data: asked(data), 1))
        policy += min(costs)
        OPENED.clear()
    print(
        f"{plain} plain files: {1e3 * whole / plain:.1f} ms a row, of which the policy takes "
        f"{1e3 * policy / plain:.3f} ms ({policy / whole:.2%})"
    )


if __name__ == "__main__":
    main()
