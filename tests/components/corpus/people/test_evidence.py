from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from skimage import data

from components.corpus.derivatives import Derivative
from components.corpus.people.evidence import (
    LookPlan,
    look_at,
    with_channel,
)
from components.corpus.people.nsfw import file_sha256, nudenet_weights
from components.signals.candidate import derivative_jpeg

CLASSICAL = LookPlan(detector="classical", nsfw="none")
DIGEST = file_sha256(nudenet_weights())
NUDENET = LookPlan(detector="nudenet", nsfw="nudenet", weights_digest=DIGEST, nsfw_digest=DIGEST)


def astronaut() -> Derivative:
    """512 px derivative of a pretended 4096 px original."""
    return Derivative("a" * 64, 4096, 4096, derivative_jpeg(data.astronaut(), 512))


@pytest.mark.parametrize("plan", [CLASSICAL, NUDENET])
def test_boxes_are_in_pixels_of_the_original_and_tag_the_image(plan: LookPlan) -> None:
    row = look_at(astronaut(), plan)
    boxes = json.loads(row["person_boxes"])
    # The cascade takes a patch of her suit for a second face.
    box = boxes[0]
    assert box["label"] == "face"
    assert box["box"][0] < 120 * 8 < box["box"][2]
    assert box["box"][1] < 225 * 8 < box["box"][3]
    assert (row["person_count"], row["is_character"]) == (len(boxes), True)
    assert "channel" not in row


def test_rows_name_their_scorers_and_weights() -> None:
    row = look_at(astronaut(), CLASSICAL)
    assert row["person_scorer"] == "skimage-lbp-frontal-face-v2"
    assert "nsfw_score" not in row
    row = look_at(astronaut(), NUDENET)
    assert (row["person_scorer"], row["person_weights"]) == ("nudenet-320n", DIGEST)
    assert (row["nsfw_scorer"], row["nsfw_weights"]) == ("nudenet-320n", DIGEST)
    assert row["nsfw_score"] == 0.0
    only_nsfw = look_at(astronaut(), replace(NUDENET, detector="none"))
    assert set(only_nsfw) == {"nsfw_score", "nsfw_scorer", "nsfw_weights"}


def test_faces_below_the_minimum_score_are_no_evidence() -> None:
    row = look_at(astronaut(), replace(NUDENET, min_score=0.99))
    assert (row["person_count"], row["person_boxes"], row["is_character"]) == (0, "[]", False)


def test_a_picture_without_faces_is_no_character() -> None:
    jpeg = derivative_jpeg(np.zeros((64, 30, 3), np.uint8), 64)
    row = look_at(Derivative("a" * 64, 64, 30, jpeg), CLASSICAL)
    assert (row["person_count"], row["person_boxes"], row["is_character"]) == (0, "[]", False)


def test_the_human_channel_is_where_an_image_comes_from_not_what_is_seen() -> None:
    people = pd.DataFrame({"image_id": list("abcd"), "is_character": [True, False, False, True]})
    manifest = pd.DataFrame(
        {
            "image_id": list("abbcd"),
            "query": [None, "mountains", " Portrait ", "lake", "portraits"],
            "source": ["x", "x", "x", "people-site", "x"],
        }
    )
    found = with_channel(people, manifest, queries=["portrait"], sources=["people-site"])
    assert found["channel"].tolist() == ["general", "human", "human", "general"]
    assert found["is_character"].tolist() == [True, False, False, True]
    assert set(with_channel(people, manifest, queries=[], sources=[])["channel"]) == {"general"}
