from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from components.images.decoding import decode_rgb
from components.signals.jpeg_quality import jpeg_quality

PIXELS = np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(mode: str = "RGB", kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_quality_that_an_image_was_saved_at_is_found(mode: str, progressive: bool) -> None:
    for quality in range(1, 101):
        tables = decode_rgb(saved(mode, quality=quality, progressive=progressive)).quantization
        assert tables is not None
        assert jpeg_quality(tables) == quality


def test_foreign_tables_get_the_nearest_quality() -> None:
    tables = decode_rgb(saved(quality=80)).quantization
    assert tables is not None
    slightly_finer = {
        number: [max(1, step - 1) for step in table] for number, table in tables.items()
    }
    assert jpeg_quality(slightly_finer) in range(80, 86)
    camera = Image.open(io.BytesIO(saved(quality="web_high"))).quantization
    assert jpeg_quality(camera) in range(65, 90)


def test_what_has_no_tables_has_no_quality() -> None:
    assert decode_rgb(saved(kind="PNG")).quantization is None
    assert jpeg_quality({}) is None
    assert jpeg_quality({0: [1, 2, 3]}) is None
