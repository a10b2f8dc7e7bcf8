"""Boxes made elsewhere or marked by hand, from the table that `people.boxes` names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.external_scores import is_name, read_external_scores
from components.corpus.people.nsfw import clipped
from components.corpus.sources.records.json_values import parse_json

_MOST_PEOPLE = 2**31 - 1
"""What the manifest's column can hold."""


def people_from_table(
    path: Path, sizes: Mapping[str, tuple[int, int]], min_score: float, *, complete: bool = True
) -> pd.DataFrame:
    """Boxes made elsewhere or marked by hand, those below `min_score` left out.

    A row's `person_boxes` is a JSON list of {"label", "box": [top, left, bottom, right], "score"};
    without boxes its `person_count` stands as it is.

    Args:
        path: `people.boxes`.
        sizes: (height, width) in pixels of every image of the corpus; boxes are clipped to it.
        min_score: `people.min_score`; a box without a score counts.
        complete: every image must have a row; otherwise the others are left to a detector.

    Returns:
        columns of `PEOPLE_SCHEMA` in the order of `sizes`, without channel and NSFW score.

    Raises:
        ValueError: see `read_external_scores`, a count that is none, or boxes that are no such
            JSON; one line.
    """
    table = read_external_scores(
        path,
        list(sizes),
        ["person_count", "person_boxes", "person_scorer"],
        setting="people.boxes",
        numeric=["person_count"],
        named=["person_scorer"],
        optional=["person_weights"],
        complete=complete,
    )
    counts, texts = [], []
    for image_id, count, text in zip(
        table["image_id"], table["person_count"], table["person_boxes"], strict=True
    ):
        try:
            if not (count.is_integer() and 0 <= count <= _MOST_PEOPLE):
                raise ValueError(f"person_count must be a whole number from 0, got {count:g}")
            boxes = None if text is None else _boxes(text, *sizes[image_id])
        except ValueError as problem:
            raise ValueError(f"people.boxes: {path.name}: {image_id}: {problem}") from None
        if boxes is not None:
            boxes = [box for box in boxes if box.get("score", math.inf) >= min_score]
        counts.append(int(count) if boxes is None else len(boxes))
        texts.append(None if boxes is None else json.dumps(boxes, allow_nan=False))
    return table.assign(
        person_count=counts,
        person_boxes=pd.Series(texts, dtype=object),
        is_character=[count > 0 for count in counts],
    )


def _boxes(text: str, height: int, width: int) -> list[dict[str, Any]]:
    """The boxes of one image.

    Raises:
        ValueError: what `person_boxes` must be and is not.
    """
    try:
        boxes = parse_json(text)
    except ValueError as problem:
        raise ValueError(f"person_boxes must be a JSON list of objects ({problem})") from None
    if not isinstance(boxes, list):
        raise ValueError(f"person_boxes must be a JSON list of objects, got {ascii(boxes)[:60]}")
    return [_box(one, height, width) for one in boxes]


def _box(found: Any, height: int, width: int) -> dict[str, Any]:
    """One box as the detectors write it, clipped to the picture as theirs are."""
    if not isinstance(found, dict):
        raise ValueError(f"each of person_boxes must be an object, got {ascii(found)[:60]}")
    if not is_name(found.get("label")):
        raise ValueError(f"a box's label must be text, got {ascii(found.get('label'))[:60]}")
    if "score" in found and not _is_finite(found["score"]):
        raise ValueError(f"a box's score must be a finite number, got {ascii(found['score'])[:60]}")
    edges = found.get("box")
    if not (isinstance(edges, list) and len(edges) == 4 and all(map(_is_finite, edges))):
        raise ValueError(
            "a box must be four finite numbers [top, left, bottom, right] of the key 'box', "
            f"got {ascii(edges)[:60]}"
        )
    top, left, bottom, right = edges
    if not (top <= bottom and left <= right):
        raise ValueError(
            "a box must be [top, left, bottom, right] with top <= bottom and left <= right, "
            f"got {ascii(edges)[:60]}"
        )
    if bottom < 0 or right < 0 or top > height or left > width:
        raise ValueError(
            f"a box lies outside of the picture of height {height} and width {width}, "
            f"got {ascii(edges)[:60]}"
        )
    score = {"score": found["score"]} if "score" in found else {}
    return {"label": found["label"], **score, "box": list(clipped(edges, height, width))}


def _is_finite(value: Any) -> bool:
    # Compared and not converted: an integer of 400 digits is finite and no float.
    return type(value) in (int, float) and abs(value) < math.inf
