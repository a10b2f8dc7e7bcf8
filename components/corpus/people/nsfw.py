"""NSFW scores: nudenet's detector, or any image classifier of transformers.

nudenet (320n, a YOLOv8 detector of 18 body parts, two of them faces) comes with its weights in the
wheel. Its wheel declares MIT but carries the AGPL-3.0 text, so it is an extra of this project. The
network is run here directly: the library's own loop over 2,100 boxes costs as much as the network.
Boxes and scores equal the library's (tested).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from components.files.install_hints import download_command, install_hint
from components.files.weight_folders import WeightsMissing, resolve_folder

NUDENET_SCORER = "nudenet-320n"

LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
"""Classes in the order of the network's outputs."""

EXPLICIT = frozenset(
    {
        "FEMALE_GENITALIA_EXPOSED",
        "MALE_GENITALIA_EXPOSED",
        "ANUS_EXPOSED",
        "FEMALE_BREAST_EXPOSED",
        "BUTTOCKS_EXPOSED",
    }
)
"""Classes that make an image unsafe; bare feet, arms, bellies and male chests do not."""

FACES = frozenset({"FACE_FEMALE", "FACE_MALE"})

UNSAFE_LABELS = frozenset({"nsfw", "unsafe", "porn", "pornography", "hentai", "explicit", "nude"})
"""Labels of image classifiers whose probabilities add up to the score."""

CLASSIFIER_COMMAND = download_command(
    "Falconsai/nsfw_image_detection", "weights/nsfw_image_detection"
)

# The library's constants.
_INPUT_PX = 320
_MIN_SCORE = 0.2
_NMS_MIN_SCORE = 0.25
_NMS_OVERLAP = 0.45


@dataclass(frozen=True)
class Detection:
    """A body part."""

    label: str
    score: float
    box: tuple[int, int, int, int]
    """(top, left, bottom, right) in pixels of the picture that was looked at."""


def clipped(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """A box (top, left, bottom, right) in whole pixels, clipped to its picture."""
    top, left, bottom, right = (
        round(min(max(edge, 0), limit))
        for edge, limit in zip(box, (height, width, height, width), strict=True)
    )
    return top, left, bottom, right


def nudenet_weights() -> Path:
    """The network's file inside the installed wheel.

    Raises:
        WeightsMissing: nudenet is not installed.
    """
    found = importlib.util.find_spec("nudenet")
    command = f"{install_hint('nsfw')} (its wheel carries the AGPL-3.0 licence)"
    if found is None or found.origin is None:
        raise WeightsMissing("nudenet", "this Python environment", command, "not installed")
    path = Path(found.origin).parent / "320n.onnx"
    if not path.is_file():
        raise WeightsMissing("nudenet's network", path.name, command)
    return path


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _session() -> Any:
    """The network, loaded once per process; one thread, since processes are the parallelism."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(nudenet_weights()), options, providers=["CPUExecutionProvider"]
    )


def _network_input(pixels: np.ndarray) -> np.ndarray:
    """(1, 3, 320, 320) float32, 0 to 1: padded to a square at the bottom right, then scaled.

    Deviation: the library converts "RGBA to BGR" whatever it is given and then swaps again, so the
    network sees the blue channel first for files that OpenCV reads; so it does here.
    """
    height, width = pixels.shape[:2]
    edge = max(height, width)
    square = cv2.copyMakeBorder(
        pixels, 0, edge - height, 0, edge - width, cv2.BORDER_CONSTANT, value=(0, 0, 0)
    )
    return cv2.dnn.blobFromImage(
        square, 1 / 255.0, (_INPUT_PX, _INPUT_PX), (0, 0, 0), swapRB=True, crop=False
    )


def _boxes_from_output(output: np.ndarray, height: int, width: int) -> list[Detection]:
    """Boxes of one picture from the network's (22, 2100) output.

    Rows are centre x, centre y, width, height in input pixels and 18 class scores.
    """
    columns = output.T
    best = columns[:, 4:].max(axis=1)
    candidates = columns[best >= _MIN_SCORE]
    if len(candidates) == 0:
        return []
    scores = candidates[:, 4:].max(axis=1)
    classes = candidates[:, 4:].argmax(axis=1)
    x, y, w, h = candidates[:, :4].T
    # The padded square's edge: the picture stands in its top left corner, so no offset is needed.
    scale = max(height, width)
    left = np.clip((x - w / 2) * scale / _INPUT_PX, 0, width)
    top = np.clip((y - h / 2) * scale / _INPUT_PX, 0, height)
    # Clipped as the library does: a box that begins left of the picture keeps its width.
    box_width = np.minimum(w * scale / _INPUT_PX, width - left)
    box_height = np.minimum(h * scale / _INPUT_PX, height - top)
    boxes = np.stack([left, top, box_width, box_height], axis=1)
    kept = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), _NMS_MIN_SCORE, _NMS_OVERLAP)
    found = []
    for place in np.asarray(kept, int).ravel():
        at_x, at_y, wide, high = (int(value) for value in boxes[place])
        box = (at_y, at_x, at_y + high, at_x + wide)
        found.append(Detection(LABELS[classes[place]], float(scores[place]), box))
    return found


def nudenet_detections(pixels: np.ndarray) -> list[Detection]:
    """Body parts, strongest first.

    Args:
        pixels: (H, W, 3) uint8, RGB.

    Raises:
        WeightsMissing: nudenet is not installed.
    """
    session = _session()
    (output,) = session.run(None, {session.get_inputs()[0].name: _network_input(pixels)})
    return _boxes_from_output(output[0], *pixels.shape[:2])


def explicit_score(detections: list[Detection]) -> float:
    """The highest score among `EXPLICIT` classes, 0 without any: 0 (safe) to 1.

    The maximum, not a sum: one exposed part is enough, and several people are not more of it.
    """
    return max((found.score for found in detections if found.label in EXPLICIT), default=0.0)


def faces(detections: list[Detection]) -> list[Detection]:
    """Faces among them."""
    return [found for found in detections if found.label in FACES]


@dataclass(frozen=True)
class ImageClassifier:
    """An image classifier of transformers and which of its outputs are unsafe."""

    model: Any
    processor: Any
    unsafe: tuple[int, ...]

    def score(self, pixels: np.ndarray) -> float:
        """Summed probability of the unsafe labels, 0 to 1.

        Args:
            pixels: (H, W, 3) uint8, RGB.
        """
        import torch

        inputs = self.processor(
            images=pixels, return_tensors="pt", input_data_format="channels_last"
        )
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits[0]
        return float(logits.double().softmax(-1)[list(self.unsafe)].sum().clamp(0, 1))


def load_classifier(folder: Path, device: str) -> ImageClassifier:
    """An image classifier from a local folder; nothing is downloaded, no code of its runs.

    Raises:
        WeightsMissing: no model there.
        ValueError: none of its labels is one of `UNSAFE_LABELS`.
    """
    folder = resolve_folder(folder, "NSFW classifier (people.nsfw.weights)", CLASSIFIER_COMMAND)
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    labels = {int(index): str(name).lower() for index, name in model.config.id2label.items()}
    unsafe = tuple(sorted(index for index, name in labels.items() if name in UNSAFE_LABELS))
    # A score that is always 0 would let everything through.
    if not unsafe:
        raise ValueError(
            f"people.nsfw.weights: {folder.name}: none of its labels {sorted(labels.values())} is "
            f"one of {sorted(UNSAFE_LABELS)}"
        )
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return ImageClassifier(model.eval().to(device), processor, unsafe)
