"""Person detectors with weights of their own: OWLv2, RT-DETR (Apache-2.0) and YOLOE (AGPL-3.0).

OWLv2 is open-vocabulary and is asked for people in words; RT-DETR knows COCO's classes. Both run
through stock classes of transformers from a local folder. YOLOE, the paper's detector, runs through
ultralytics, whose licence is AGPL-3.0: an extra that nothing here imports unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from components.corpus.people.nsfw import Detection, clipped
from components.files.install_hints import download_command, install_hint
from components.files.weight_folders import WeightsMissing, resolve_folder

DetectorKind = Literal["owlv2", "rtdetr", "yoloe"]
FindPeople = Callable[[np.ndarray], list[Detection]]
"""(H, W, 3) uint8 RGB -> people in pixels of that picture, strongest first."""

OWL_QUERY = "a photo of a person"

_COMMANDS = {
    "owlv2": download_command("google/owlv2-base-patch16-ensemble", "weights/owlv2"),
    "rtdetr": download_command("PekingU/rtdetr_r50vd", "weights/rtdetr"),
    "yoloe": f"{install_hint('people')} and fetch yoloe-11l-seg.pt from ultralytics",
}


def check_weights(kind: DetectorKind, weights: Path | None) -> Path:
    """The folder (YOLOE: the file) with the detector's weights.

    Raises:
        WeightsMissing: not there; the message has the command that gets it.
    """
    what = f"{kind} weights (people.weights)"
    if kind != "yoloe":
        return resolve_folder(weights, what, _COMMANDS[kind])
    if weights is None or not weights.is_file():
        raise WeightsMissing(what, weights or "(no file set)", _COMMANDS[kind])
    return weights


def _detections(boxes: Any, scores: Any, height: int, width: int) -> list[Detection]:
    """Boxes (left, top, right, bottom) as rows, clipped to the picture, strongest first."""
    found = []
    for (left, top, right, bottom), score in zip(boxes, scores, strict=True):
        corners = clipped((top, left, bottom, right), height, width)
        found.append(Detection("person", float(score), corners))
    # By box among equal scores, whose order the libraries do not promise.
    return sorted(found, key=lambda one: (-one.score, one.box))


def _load_owlv2(folder: Path, device: str, min_score: float) -> FindPeople:
    import torch
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    processor = Owlv2Processor.from_pretrained(folder, local_files_only=True)
    model = Owlv2ForObjectDetection.from_pretrained(folder, local_files_only=True).eval().to(device)

    def find(pixels: np.ndarray) -> list[Detection]:
        height, width = pixels.shape[:2]
        inputs = processor(
            images=pixels,
            text=[[OWL_QUERY]],
            return_tensors="pt",
            input_data_format="channels_last",
        )
        with torch.inference_mode():
            outputs = model(**inputs.to(device))
        (result,) = processor.post_process_grounded_object_detection(
            outputs, threshold=min_score, target_sizes=[(height, width)]
        )
        return _detections(result["boxes"].tolist(), result["scores"].tolist(), height, width)

    return find


def _load_rtdetr(folder: Path, device: str, min_score: float) -> FindPeople:
    import torch
    from transformers import AutoImageProcessor, RTDetrForObjectDetection

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model = RTDetrForObjectDetection.from_pretrained(folder, local_files_only=True)
    model = model.eval().to(device)
    labels = {int(index): str(name).lower() for index, name in model.config.id2label.items()}
    # Weights for other things would find nobody, and every photograph would be without people.
    if "person" not in labels.values():
        raise ValueError(f"people.weights: {folder.name}: no label 'person' among its classes")

    def find(pixels: np.ndarray) -> list[Detection]:
        height, width = pixels.shape[:2]
        inputs = processor(images=pixels, return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            outputs = model(**inputs.to(device))
        (result,) = processor.post_process_object_detection(
            outputs, threshold=min_score, target_sizes=[(height, width)]
        )
        is_person = [labels[label] == "person" for label in result["labels"].tolist()]
        boxes = [box for box, yes in zip(result["boxes"].tolist(), is_person, strict=True) if yes]
        scores = [
            score for score, yes in zip(result["scores"].tolist(), is_person, strict=True) if yes
        ]
        return _detections(boxes, scores, height, width)

    return find


def _load_yoloe(file: Path, device: str, min_score: float) -> FindPeople:
    try:
        from ultralytics import YOLOE
    except ImportError:
        raise WeightsMissing(
            "ultralytics",
            "this Python environment",
            f"{install_hint('people')} (ultralytics is AGPL-3.0: read its licence "
            "before you use it in a product; owlv2 and rtdetr are Apache-2.0)",
            "not installed",
        ) from None
    model = YOLOE(str(file))
    model.set_classes(["person"], model.get_text_pe(["person"]))

    def find(pixels: np.ndarray) -> list[Detection]:
        height, width = pixels.shape[:2]
        # ultralytics takes arrays as OpenCV reads them: blue first.
        bgr = np.ascontiguousarray(pixels[..., ::-1])
        (result,) = model.predict(bgr, conf=min_score, device=device, verbose=False)
        boxes = result.boxes
        return _detections(boxes.xyxy.tolist(), boxes.conf.tolist(), height, width)

    return find


def load_detector(kind: DetectorKind, weights: Path, device: str, min_score: float) -> FindPeople:
    """A detector from local weights; nothing is downloaded and no code of a model folder runs.

    Args:
        kind: "owlv2", "rtdetr" or "yoloe".
        weights: folder in the Hugging Face layout; for YOLOE its file.
        device: "cpu" or "cuda".
        min_score: people below it are left out, 0 to 1.

    Raises:
        WeightsMissing: weights or the library are not there.
        ValueError: the model knows no people.
    """
    load = {"owlv2": _load_owlv2, "rtdetr": _load_rtdetr, "yoloe": _load_yoloe}[kind]
    return load(check_weights(kind, weights), device, min_score)
