from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from components.corpus.people.boxes_table import people_from_table

SIZE = (20, 30)
BOX = {"label": "person", "box": [0, 0, 9, 9]}


def one_row(folder: Path, boxes: str | None, count: Any = 1) -> pd.DataFrame:
    """What is read of a table of one image."""
    row = {"image_id": "x", "person_count": count, "person_boxes": boxes, "person_scorer": "7"}
    pd.DataFrame([row]).to_csv(folder / "p.csv", index=False)
    return people_from_table(folder / "p.csv", {"x": SIZE}, 0.5)


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
    table = people_from_table(tmp_path / "p.parquet", {"y": SIZE, "x": SIZE}, 0.5)
    assert table["person_count"].tolist() == [0, 1]
    assert table["is_character"].tolist() == [False, True]


def test_a_table_that_must_be_complete_names_what_it_lacks_and_another_leaves_it_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.csv"
    pd.DataFrame(
        {
            "image_id": ["x", "z"],
            "person_count": [1, 0],
            "person_boxes": ['[{"label": "person", "box": [0, 0, 9, 9]}]', "[]"],
            "person_scorer": "hand",
        }
    ).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"1 of 2 image_id have no row, first y"):
        people_from_table(path, {"y": SIZE, "x": SIZE}, 0.5)
    table = people_from_table(path, {"y": SIZE, "x": SIZE}, 0.5, complete=False)
    assert table["image_id"].tolist() == ["x"]
    # A box without a score was marked by a person: it counts.
    assert table["person_count"].tolist() == [1]
    assert people_from_table(path, {"y": SIZE}, 0.5, complete=False).empty


def test_boxes_are_written_as_the_detectors_write_theirs(tmp_path: Path) -> None:
    found = one_row(tmp_path, json.dumps([BOX | {"box": [-4, 2.6, 9, 1e9], "more": 1}]))
    assert json.loads(found["person_boxes"][0]) == [{"label": "person", "box": [0, 3, 9, 30]}]
    # By its text, though all of its column are digits.
    assert found["person_scorer"][0] == "7"
    assert one_row(tmp_path, None, 3)["person_count"].tolist() == [3]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("{", "must be a JSON list of objects \\(not JSON"),
        ("[" * 100_000, "must be a JSON list of objects \\(nested too deeply"),
        ("{}", "must be a JSON list of objects, got {}"),
        ('""', "must be a JSON list of objects, got ''"),
        ("7", "must be a JSON list of objects, got 7"),
        ("[[1, 2, 3, 4]]", "must be an object"),
        (json.dumps([BOX | {"score": float("nan")}]), "score must be a finite number, got nan"),
        (json.dumps([BOX | {"score": "high"}]), "score must be a finite number, got 'high'"),
        (json.dumps([{"box": BOX["box"]}]), "label must be text, got None"),
        (json.dumps([BOX | {"label": "a\x1b[2J"}]), r"label must be text, got 'a\\x1b"),
        (json.dumps([{"label": "person", "xyxy": [1, 2, 3, 4]}]), "four finite numbers .*got None"),
        (json.dumps([BOX | {"box": [1, 2, 3]}]), "four finite numbers"),
        (json.dumps([BOX | {"box": [1, 2, float("inf"), 4]}]), "four finite numbers"),
        (json.dumps([BOX | {"box": [9, 0, 0, 9]}]), "top <= bottom"),
        (json.dumps([BOX | {"box": [0, 31, 9, 40]}]), "outside of the picture of height 20"),
    ],
)
def test_boxes_that_are_none_are_one_clear_error(tmp_path: Path, boxes: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^people\.boxes: p\.csv: x: .*{message}.*$"):
        one_row(tmp_path, boxes)


@pytest.mark.parametrize("count", [0.9, -3, 3e9])
def test_a_count_of_people_is_a_whole_number(tmp_path: Path, count: float) -> None:
    with pytest.raises(ValueError, match=r"x: person_count must be a whole number from 0, got"):
        one_row(tmp_path, "[]", count)
