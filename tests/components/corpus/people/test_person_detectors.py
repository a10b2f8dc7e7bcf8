from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from components.corpus.people.person_detectors import OWL_QUERY, check_weights, load_detector
from components.files.weight_folders import WeightsMissing


def tiny_owlv2(folder: Path) -> None:
    """A random OWLv2: CLIP towers with box and class heads, and a character tokenizer."""
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)]
    words = letters + [f"{letter}</w>" for letter in letters]
    vocab = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {
        **tower,
        "num_attention_heads": 2,
        "vocab_size": len(vocab),
        "max_position_embeddings": 32,
    }
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = {**tower, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(
        Owlv2ImageProcessor(size={"height": 64, "width": 64}),
        CLIPTokenizer(vocab=vocab, merges=[], model_max_length=32),
    ).save_pretrained(folder)


def tiny_rtdetr(folder: Path, labels: list[str]) -> None:
    """A random RT-DETR: ResNet backbone, hybrid encoder, deformable decoder."""
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
    )

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=12,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        id2label=dict(enumerate(labels)),
        label2id={name: n for n, name in enumerate(labels)},
    )
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def check_boxes(found: list, height: int, width: int) -> None:
    for one in found:
        top, left, bottom, right = one.box
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width
        assert one.label == "person"
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_owlv2_boxes_are_those_of_the_library_in_pixels_of_the_picture(tmp_path: Path) -> None:
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    tiny_owlv2(tmp_path)
    pixels = np.ascontiguousarray(data.astronaut()[:300, :500])
    found = load_detector("owlv2", tmp_path, "cpu", 0.0)(pixels)
    check_boxes(found, 300, 500)
    processor = Owlv2Processor.from_pretrained(tmp_path)
    inputs = processor(images=pixels, text=[[OWL_QUERY]], return_tensors="pt")
    with torch.inference_mode():
        outputs = Owlv2ForObjectDetection.from_pretrained(tmp_path).eval()(**inputs)
    expected = outputs.logits.sigmoid().flatten().sort(descending=True).values
    np.testing.assert_allclose([one.score for one in found], expected.tolist(), atol=1e-6)
    border = found[3].score
    assert len(load_detector("owlv2", tmp_path, "cpu", border - 1e-6)(pixels)) == 4


def test_rtdetr_keeps_people_and_leaves_other_classes_out(tmp_path: Path) -> None:
    tiny_rtdetr(tmp_path / "some", ["person", "cat"])
    pixels = np.ascontiguousarray(data.astronaut()[:300, :500])
    found = load_detector("rtdetr", tmp_path / "some", "cpu", 0.0)(pixels)
    check_boxes(found, 300, 500)
    # Each of 12 queries and 2 classes competes for 12 places; some are cats.
    assert 0 < len(found) < 12
    tiny_rtdetr(tmp_path / "none", ["dog", "cat"])
    with pytest.raises(ValueError, match="no label 'person'"):
        load_detector("rtdetr", tmp_path / "none", "cpu", 0.5)


def test_missing_weights_come_with_the_command_that_gets_them(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsMissing, match=r"owlv2 weights \(people\.weights\).*hf download goog"
    ):
        check_weights("owlv2", tmp_path / "none")
    with pytest.raises(WeightsMissing, match="hf download PekingU"):
        check_weights("rtdetr", None)


def test_yoloe_without_its_extra_names_extra_and_licence(tmp_path: Path) -> None:
    (tmp_path / "yoloe.pt").touch()
    with pytest.raises(WeightsMissing, match=r"pip install -e '\.\[people\]'.*AGPL-3\.0"):
        load_detector("yoloe", tmp_path / "yoloe.pt", "cpu", 0.5)
