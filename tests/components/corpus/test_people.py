from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from skimage import data

from components.corpus.derivatives import Derivative
from components.corpus.people import detect_people, find_faces, people_from_table
from components.corpus.signals import derivative_jpeg


def test_the_astronaut_has_one_face_where_it_is() -> None:
    ((top, left, bottom, right),) = find_faces(data.astronaut())
    assert top < 120 < bottom
    assert left < 225 < right


def test_boxes_are_in_pixels_of_the_original_and_tag_the_image() -> None:
    jpeg = derivative_jpeg(data.astronaut(), 512)
    row = detect_people(Derivative("a" * 64, 4096, 4096, jpeg))
    (box,) = json.loads(row["person_boxes"])
    assert box["label"] == "face"
    assert box["box"][0] < 120 * 8 < box["box"][2]
    assert (row["person_count"], row["is_character"], row["channel"]) == (1, True, "human")
    assert row["person_scorer"] == "skimage-lbp-frontal-face-v1"


def test_a_picture_without_faces_is_general() -> None:
    jpeg = derivative_jpeg(np.zeros((64, 30, 3), np.uint8), 64)
    row = detect_people(Derivative("a" * 64, 64, 30, jpeg))
    assert (row["person_count"], row["person_boxes"], row["channel"]) == (0, "[]", "general")


def test_external_boxes_below_the_minimum_score_do_not_count(tmp_path: Path) -> None:
    boxes = [{"label": "person", "box": [0, 0, 9, 9], "score": score} for score in (0.9, 0.3)]
    pd.DataFrame(
        {
            "image_id": ["x", "y"],
            "person_count": [2, 1],
            "person_boxes": [json.dumps(boxes), json.dumps(boxes[1:])],
            "person_scorer": ["detector"] * 2,
        }
    ).to_parquet(tmp_path / "p.parquet")
    table = people_from_table(tmp_path / "p.parquet", ["y", "x"], 0.5)
    assert table["person_count"].tolist() == [0, 1]
    assert table["channel"].tolist() == ["general", "human"]


def test_boxes_that_are_no_json_list_are_one_clear_error(tmp_path: Path) -> None:
    pd.DataFrame(
        {"image_id": ["x"], "person_count": [1], "person_boxes": ["{"], "person_scorer": ["d"]}
    ).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(ValueError, match=r"people\.boxes: p\.csv: x: person_boxes must be"):
        people_from_table(tmp_path / "p.csv", ["x"], 0.5)
