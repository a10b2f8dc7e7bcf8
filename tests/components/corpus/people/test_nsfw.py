from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from nudenet import NudeDetector
from PIL import Image
from skimage import data

from components.corpus.people.nsfw import (
    LABELS,
    Detection,
    _boxes_from_output,
    explicit_score,
    faces,
    file_sha256,
    load_classifier,
    nudenet_detections,
    nudenet_weights,
)
from components.files.weight_folders import WeightsMissing


@pytest.mark.parametrize("shape", [(512, 512), (300, 512), (512, 260)])
def test_boxes_and_scores_are_those_of_the_library(shape: tuple[int, int]) -> None:
    pixels = np.ascontiguousarray(data.astronaut()[: shape[0], : shape[1]])
    expected = NudeDetector().detect(np.ascontiguousarray(pixels[..., ::-1]))
    found = nudenet_detections(pixels)
    assert [one.label for one in found] == [one["class"] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.score == pytest.approx(theirs["score"], abs=1e-5)
        x, y, w, h = theirs["box"]
        np.testing.assert_allclose(ours.box, (y, x, y + h, x + w), atol=1)
    assert [one.label for one in faces(found)] == ["FACE_FEMALE"]
    assert explicit_score(found) == 0.0


def test_decoding_of_random_network_outputs_is_the_librarys() -> None:
    from nudenet.nudenet import _postprocess

    rng = np.random.default_rng(0)
    for height, width in ((300, 700), (700, 300), (64, 64)):
        edge = max(height, width)
        output = np.concatenate(
            [
                rng.uniform(0, 320, (2, 400)),
                rng.uniform(1, 200, (2, 400)),
                rng.random((18, 400)) ** 9,
            ]
        ).astype(np.float32)
        expected = _postprocess(
            [output[None]], edge - width, edge - height, 1, 1, width, height, 320, 320
        )
        found = _boxes_from_output(output, height, width)
        assert [(one.label, one.score) for one in found] == [
            (one["class"], one["score"]) for one in expected
        ]
        for ours, theirs in zip(found, expected, strict=True):
            x, y, w, h = theirs["box"]
            np.testing.assert_allclose(ours.box, (y, x, y + h, x + w), atol=1)
        assert len(found) > 5


def test_only_exposed_intimate_parts_make_a_score() -> None:
    parts = [Detection(label, 0.5, (0, 0, 1, 1)) for label in LABELS]
    assert explicit_score(parts) == 0.5
    covered = [part for part in parts if "COVERED" in part.label or "FACE" in part.label]
    assert explicit_score([*covered, Detection("FEET_EXPOSED", 0.9, (0, 0, 1, 1))]) == 0.0
    assert explicit_score([*parts, Detection("BUTTOCKS_EXPOSED", 0.7, (0, 0, 1, 1))]) == 0.7
    assert explicit_score([]) == 0.0


def test_the_digest_of_the_weights_is_the_sha256_of_the_file() -> None:
    expected = hashlib.sha256(nudenet_weights().read_bytes()).hexdigest()
    assert file_sha256(nudenet_weights()) == expected


def tiny_classifier(folder: Path, labels: list[str]) -> None:
    """A random vision transformer in the architecture of the common NSFW classifiers."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={name: n for n, name in enumerate(labels)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_a_classifier_adds_the_probabilities_of_its_unsafe_labels(tmp_path: Path) -> None:
    from transformers import pipeline

    tiny_classifier(tmp_path, ["drawing", "Hentai", "neutral", "porn"])
    classifier = load_classifier(tmp_path, "cpu")
    assert classifier.unsafe == (1, 3)
    pixels = data.astronaut()
    outputs = pipeline("image-classification", model=str(tmp_path), top_k=None)(
        Image.fromarray(pixels)
    )
    expected = sum(out["score"] for out in outputs if out["label"] in ("Hentai", "porn"))
    assert classifier.score(pixels) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_without_unsafe_labels_and_a_missing_one_are_clear_errors(
    tmp_path: Path,
) -> None:
    tiny_classifier(tmp_path, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"none of its labels \['cat', 'dog'\]"):
        load_classifier(tmp_path, "cpu")
    with pytest.raises(WeightsMissing, match=r"people\.nsfw\.weights.* get it with: hf download"):
        load_classifier(tmp_path / "none", "cpu")
