"""Two folders of pictures at 4096 x 4096 and their originals, for a full evaluation on a CPU.

    python benchmarks/evaluation_4k.py runs/evaluation-4k
    ultraflux evaluate runs/evaluation-4k/originals --metrics weight-free,psnr_db,ssim,nmse ...

Bundled photographs are resized to cover 4096 x 4096 and cropped; one folder holds them as JPEG of
quality 50, one blurred with a Gaussian of radius 2 px. `docs/evaluation.md` has the whole command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageFilter

from components.images.aspect_buckets import Bucket, fit_to_bucket

SIZE_PX = 4096
SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"


def make(target: Path, count: int) -> None:
    """Write `originals/` (with metadata.jsonl), `jpeg50/` and `blur/` below `target`."""
    records = []
    for line in (SAMPLE / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        entry = json.loads(line)
        name = entry["file"]
        text = entry.get("caption_en") or entry.get("text") or entry["caption"]
        with Image.open(SAMPLE / name) as photograph:
            picture = fit_to_bucket(photograph.convert("RGB"), Bucket(SIZE_PX, SIZE_PX))
        versions = {
            "originals": (picture, 95),
            "jpeg50": (picture, 50),
            "blur": (picture.filter(ImageFilter.GaussianBlur(2)), 95),
        }
        for folder, (version, quality) in versions.items():
            (target / folder).mkdir(parents=True, exist_ok=True)
            version.save(target / folder / name, quality=quality, subsampling=0)
        records.append(json.dumps({"file_name": name, "text": text}, ensure_ascii=False))
    (target / "originals" / "metadata.jsonl").write_text(
        "\n".join(records) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--count", type=int, default=4, help="photographs (of the sample)")
    arguments = parser.parse_args()
    make(arguments.target, arguments.count)
