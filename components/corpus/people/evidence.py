"""Evidence of people, NSFW scores, the `character` tag and the human channel.

Every derivative is decoded once for both. Detectors: the classical one is scikit-image's cascade of
local binary patterns for frontal faces, which ships with that library; it finds upright faces that
look at the camera and nothing else, and gives no confidence, so `people.min_score` does not apply
to it. nudenet finds faces on its way to an NSFW score; OWLv2, RT-DETR and YOLOE find whole people
(components/corpus/people/person_detectors.py).

nsfwjs' network tells photographs from drawings on its way to an NSFW score (`drawing_score`).

Where no NSFW scorer is chosen `nsfw_score` stays null: no score is better than a pretended one.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from components.corpus.derivatives import Derivative
from components.corpus.people import faces, nsfw, person_detectors
from components.images.decoding import decode_rgb

if TYPE_CHECKING:
    import pandas as pd

    from components.corpus.people.nsfwjs import NsfwNetwork

NSFWJS_SCORER = "nsfwjs-mobilenet_v2"

PEOPLE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("person_count", pa.int32()),
        ("person_boxes", pa.string()),
        ("person_scorer", pa.string()),
        ("person_weights", pa.string()),
        ("is_character", pa.bool_()),
        ("channel", pa.string()),
        ("nsfw_score", pa.float64()),
        ("nsfw_scorer", pa.string()),
        ("nsfw_weights", pa.string()),
        ("drawing_score", pa.float64()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class LookPlan:
    """What is looked for, with what; everything that a row depends on beside the picture."""

    detector: Literal["none", "classical", "nudenet", "owlv2", "rtdetr", "yoloe"]
    nsfw: Literal["none", "nsfwjs", "nudenet", "classifier"]
    min_score: float = 0.5
    device: str = "cpu"
    weights: Path | None = None
    weights_digest: str | None = None
    nsfw_weights: Path | None = None
    nsfw_digest: str | None = None

    @property
    def runs_networks(self) -> bool:
        """Whether models of torch are loaded, which need more time and memory."""
        return self.detector in ("owlv2", "rtdetr", "yoloe") or self.nsfw in (
            "nsfwjs",
            "classifier",
        )

    def key(self) -> dict[str, Any]:
        """What shards are named after: no paths, since the digests say what lay there."""
        return {
            "detector": self.detector,
            "nsfw": self.nsfw,
            "min_score": self.min_score,
            "weights": self.weights_digest,
            "nsfw_weights": self.nsfw_digest,
        }


# Loaded once per worker.
_load_detector = cache(person_detectors.load_detector)
_load_classifier = cache(nsfw.load_classifier)


@cache
def _load_nsfwjs(folder: Path, device: str) -> NsfwNetwork:
    # Here, not above: it imports torch, which workers without networks do not need.
    from components.corpus.people.nsfwjs import load_network

    return load_network(folder, device)


def _entry(box: tuple[int, int, int, int], scale: tuple[float, float]) -> list[int]:
    """A box of the derivative in pixels of the original."""
    vertical, horizontal = scale
    top, left, bottom, right = box
    return [
        round(top * vertical),
        round(left * horizontal),
        round(bottom * vertical),
        round(right * horizontal),
    ]


def look_at(derivative: Derivative, plan: LookPlan) -> dict[str, Any]:
    """A row of `PEOPLE_SCHEMA` without channel; boxes are in pixels of the original.

    Raises:
        WeightsMissing: weights or a library that the plan names are not there.
    """
    pixels = decode_rgb(derivative.jpeg).pixels
    scale = (derivative.height / pixels.shape[0], derivative.width / pixels.shape[1])
    row: dict[str, Any] = {}
    boxes: list[dict[str, Any]] = []
    # Once for both questions: the network finds faces and exposed parts in one pass.
    seen = nsfw.nudenet_detections(pixels) if "nudenet" in (plan.detector, plan.nsfw) else []
    if plan.detector == "classical":
        boxes = [{"label": "face", "box": _entry(box, scale)} for box in faces.find_faces(pixels)]
        row |= {"person_scorer": faces.FACE_SCORER}
    elif plan.detector == "nudenet":
        people = [face for face in nsfw.faces(seen) if face.score >= plan.min_score]
        boxes = [
            {"label": "face", "score": face.score, "box": _entry(face.box, scale)}
            for face in people
        ]
        row |= {"person_scorer": nsfw.NUDENET_SCORER, "person_weights": plan.weights_digest}
    elif plan.detector != "none":
        assert plan.weights is not None
        find = _load_detector(plan.detector, plan.weights, plan.device, plan.min_score)
        boxes = [
            {"label": one.label, "score": one.score, "box": _entry(one.box, scale)}
            for one in find(pixels)
        ]
        row |= {"person_scorer": plan.detector, "person_weights": plan.weights_digest}
    if plan.detector != "none":
        row |= {
            "person_count": len(boxes),
            "person_boxes": json.dumps(boxes),
            "is_character": len(boxes) > 0,
        }
    if plan.nsfw == "nudenet":
        row |= {"nsfw_score": nsfw.explicit_score(seen), "nsfw_scorer": nsfw.NUDENET_SCORER}
    elif plan.nsfw == "nsfwjs":
        assert plan.nsfw_weights is not None
        classes = _load_nsfwjs(plan.nsfw_weights, plan.device).classify(pixels)
        row |= {
            "nsfw_score": classes.nsfw_score,
            "nsfw_scorer": NSFWJS_SCORER,
            "drawing_score": classes.drawing_score,
        }
    elif plan.nsfw == "classifier":
        assert plan.nsfw_weights is not None
        classifier = _load_classifier(plan.nsfw_weights, plan.device)
        row |= {
            "nsfw_score": classifier.score(pixels),
            "nsfw_scorer": f"classifier-{plan.nsfw_weights.name}",
        }
    if plan.nsfw != "none":
        row |= {"nsfw_weights": plan.nsfw_digest}
    return row


def with_channel(
    people: pd.DataFrame,
    manifest: pd.DataFrame,
    *,
    queries: Collection[str],
    sources: Collection[str],
) -> pd.DataFrame:
    """Fill `channel` from provenance: "human" for what human-related retrieval found.

    A channel says where an image comes from; what is seen in it is `is_character`, which needs a
    detection. An image that several rows of the manifest share is human when one of them is.

    Args:
        people: has image_id; unchanged.
        manifest: image_id, query and source.
        queries: `people.human_queries`, compared without case and surrounding space.
        sources: `people.human_sources`, compared exactly.
    """
    wanted = {query.strip().casefold() for query in queries}
    found_by = manifest["query"].map(lambda text: str(text).strip().casefold(), na_action="ignore")
    is_human = found_by.isin(wanted) | manifest["source"].isin(list(sources))
    human = people["image_id"].isin(manifest.loc[is_human, "image_id"])
    return people.assign(channel=np.where(human, "human", "general"))
