"""CLIP scores on a tiny random CLIP: the stock model's logits, the limits, the published head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from components.metrics.metric import Picture
from components.metrics.networks.clip import (
    AestheticHead,
    AestheticMetric,
    ClipEncoder,
    PromptMetric,
)

PICTURE = Picture(Path("a.png"), "0" * 64, prompt="a lighthouse at dusk")


def _tokenizer() -> CLIPTokenizerFast:
    """CLIP's class over single bytes; its two special tokens come last, as in the real one."""
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizerFast(vocab=vocabulary, merges=[])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tokenizer = _tokenizer()
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClipEncoder:
    return ClipEncoder(folder, "cpu")


def _rgb(seed: int, height: int = 100, width: int = 140) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_both_scores_are_the_stock_models_logits(folder: Path, encoder: ClipEncoder) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    rgb = _rgb(1)
    tokens = _tokenizer()(PICTURE.prompt, return_tensors="pt", truncation=True, max_length=24)
    pixels = processor(images=Image.fromarray(rgb), return_tensors="pt")
    with torch.no_grad():
        logit = float(model(**tokens, **pixels).logits_per_image)
    pick = PromptMetric("pickscore", encoder, "logit", "0").measure(rgb, PICTURE)
    assert pick == {"pickscore": pytest.approx(logit, rel=1e-4)}
    clip = PromptMetric("clip_score", encoder, "cosine", "0").measure(rgb, PICTURE)
    cosine = logit / float(model.logit_scale.exp())
    assert clip == {"clip_score": pytest.approx(max(100 * cosine, 0), rel=1e-4, abs=1e-4)}


def test_text_beyond_the_window_changes_nothing(encoder: ClipEncoder) -> None:
    start = "abcdefghijklmnopqrstuvwxyz"
    assert torch.equal(encoder.text(start), encoder.text(start + " more of it"))
    assert not torch.equal(encoder.text("abc"), encoder.text("abd"))


def test_a_negative_cosine_is_a_clip_score_of_zero(encoder: ClipEncoder) -> None:
    metric = PromptMetric("clip_score", encoder, "cosine", "0")
    values = [metric.measure(_rgb(seed), PICTURE)["clip_score"] for seed in range(3)]
    assert all(value is not None and 0 <= value <= 100 for value in values)


def test_a_picture_without_prompt_is_named(encoder: ClipEncoder) -> None:
    metric = PromptMetric("clip_score", encoder, "cosine", "0")
    with pytest.raises(ValueError, match=r"a\.png: this metric needs the prompt"):
        metric.measure(_rgb(1), Picture(Path("a.png"), "0"))


def _published_head(width: int) -> torch.nn.Module:
    """The released script's layers, written out."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    return torch.nn.ModuleDict({"layers": layers}).eval()


def test_the_aesthetic_head_equals_the_published_architecture(encoder: ClipEncoder) -> None:
    torch.manual_seed(2)
    published = _published_head(24)
    metric = AestheticMetric(encoder, published.state_dict(), "0")
    rgb = _rgb(3)
    with torch.no_grad():
        expected = float(published["layers"](encoder.image(rgb)[None]))
    assert metric.measure(rgb, PICTURE)["laion_aesthetics"] == pytest.approx(expected, rel=1e-5)
    AestheticHead().load_state_dict(_published_head(768).state_dict())
