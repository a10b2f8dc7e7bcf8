"""Evidence of people: the `character` tag and the human channel.

The classical detector is scikit-image's cascade of local binary patterns for frontal faces, which
ships with the library. It finds upright faces that look at the camera and nothing else: people seen
from behind or far away are missed, and it gives no confidence, so `people.min_score` applies to
boxes made elsewhere (`people.detector: table`) only.

There is no classical substitute for an NSFW classifier, so `nsfw_score` stays null: no score is
better than a pretended one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.corpus.decoding import decode_rgb
from components.corpus.derivatives import Derivative
from components.corpus.flat_regions import grayscale

if TYPE_CHECKING:
    import pandas as pd

FACE_SCORER = "skimage-lbp-frontal-face-v1"

PEOPLE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("person_count", pa.int32()),
        ("person_boxes", pa.string()),
        ("person_scorer", pa.string()),
        ("is_character", pa.bool_()),
        ("channel", pa.string()),
        ("nsfw_score", pa.float64()),
        ("error", pa.string()),
    ]
)

# Scan of the derivative: faces of 40 px and more, 20% steps in scale, every position (coarser steps
# miss plain portraits).
_MIN_FACE_PX = 40
_SCALE_FACTOR = 1.2
_STEP_RATIO = 1.0
# Windows that must agree on a face; the library's 4 finds faces in leaves and tiles.
_MIN_NEIGHBOURS = 8


@cache
def _cascade() -> Any:
    """The cascade, loaded once per process."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())


def find_faces(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Frontal faces as (top, left, bottom, right) in pixels, from top to bottom.

    Args:
        pixels: (H, W, 3) uint8, RGB.
    """
    gray = grayscale(pixels)
    edge = min(gray.shape)
    if edge < _MIN_FACE_PX:
        return []
    found = _cascade().detect_multi_scale(
        img=gray,
        scale_factor=_SCALE_FACTOR,
        step_ratio=_STEP_RATIO,
        min_size=(_MIN_FACE_PX, _MIN_FACE_PX),
        max_size=(edge, edge),
        min_neighbor_number=_MIN_NEIGHBOURS,
    )
    return sorted(
        (box["r"], box["c"], box["r"] + box["height"], box["c"] + box["width"]) for box in found
    )


def _tags(count: int) -> dict[str, Any]:
    return {"is_character": count > 0, "channel": "human" if count else "general"}


def detect_people(derivative: Derivative) -> dict[str, Any]:
    """A row of `PEOPLE_SCHEMA` for one derivative; boxes are in pixels of the original."""
    pixels = decode_rgb(derivative.jpeg).pixels
    vertical = derivative.height / pixels.shape[0]
    horizontal = derivative.width / pixels.shape[1]
    boxes = [
        {
            "label": "face",
            "box": [
                round(top * vertical),
                round(left * horizontal),
                round(bottom * vertical),
                round(right * horizontal),
            ],
        }
        for top, left, bottom, right in find_faces(pixels)
    ]
    return {
        "person_count": len(boxes),
        "person_boxes": json.dumps(boxes),
        "person_scorer": FACE_SCORER,
        **_tags(len(boxes)),
    }


def _confident_boxes(text: Any, min_score: float, where: str) -> list[dict[str, Any]]:
    try:
        boxes = json.loads(text)
        return [box for box in boxes if float(box.get("score", 1.0)) >= min_score]
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{where}: person_boxes must be a JSON list of objects with a number 'score', "
            f"got {str(text)[:60]!r}"
        ) from None


def people_from_table(path: Path, image_ids: list[str], min_score: float) -> pd.DataFrame:
    """Boxes made elsewhere, those below `min_score` left out.

    A row's `person_boxes` is a JSON list of {"label", "box": [top, left, bottom, right], "score"};
    without boxes its `person_count` stands as it is.

    Returns:
        columns of `PEOPLE_SCHEMA`, in the order of `image_ids`.

    Raises:
        ValueError: see `read_external_scores`, or boxes that are no such JSON.
    """
    # Here, not above: workers import this module and have no use for pandas.
    import pandas as pd

    from components.corpus.scores import read_external_scores

    table = read_external_scores(
        path,
        image_ids,
        ["person_count", "person_boxes", "person_scorer"],
        setting="people.boxes",
        numeric=["person_count"],
    )
    rows = []
    for row in table.to_dict("records"):
        count, text = int(row["person_count"]), None
        if isinstance(row["person_boxes"], str):
            where = f"people.boxes: {path.name}: {row['image_id']}"
            boxes = _confident_boxes(row["person_boxes"], min_score, where)
            count, text = len(boxes), json.dumps(boxes)
        rows.append(
            {
                "image_id": row["image_id"],
                "person_count": count,
                "person_boxes": text,
                "person_scorer": row["person_scorer"],
                **_tags(count),
            }
        )
    return pd.DataFrame(rows, columns=PEOPLE_SCHEMA.names)
