"""HPSv3 on a tiny random checkpoint of the true architecture, saved as the release is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from components.files.weight_folders import WeightsMissing
from components.metrics.metric import DeferredMetric, Picture
from components.metrics.networks.hpsv3 import CHECKPOINT, PIXELS, HpsV3, fitted, reward_head
from components.metrics.networks.hpsv3_prompt import conversation
from components.metrics.registry import open_metric

PROMPT = "a lighthouse at dusk, {calm} sea"
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's class over single bytes, its control tokens last, as in the real one."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    return tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ with both folders; parameters named as transformers 4.45 saved them."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = tiny_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Larger than the tokenizer, as in the real one; the release cut it.
        "vocab_size": 400,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    # Embeddings and states large enough that positions and pixels move the score.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
    head = reward_head(32)
    state = {}
    for key, value in model.state_dict().items():
        old = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        state[old] = value.clone().contiguous()
    state |= {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    (folder / "hpsv3").mkdir()
    save_file(state, folder / "hpsv3" / CHECKPOINT)
    texts = folder / "qwen2-vl-7b-texts"
    config.save_pretrained(texts)
    tokenizer.save_pretrained(texts)
    return folder


@pytest.fixture(scope="module")
def network(weights: Path) -> HpsV3:
    return HpsV3(weights / "hpsv3" / CHECKPOINT, weights / "qwen2-vl-7b-texts", "cpu")


def picture(seed: int, height: int = 300, width: int = 520) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    tiled = np.kron(small, np.ones((height // 6 + 1, width // 9 + 1, 1), np.uint8))
    return tiled[:height, :width]


def stock(
    weights: Path, network: HpsV3, rgb: np.ndarray, *, with_rows: bool
) -> tuple[float, float]:
    """transformers' own model and a head by hand, on the same inputs."""
    state = load_file(weights / "hpsv3" / CHECKPOINT)
    config = Qwen2VLConfig.from_pretrained(weights / "qwen2-vl-7b-texts")
    config.text_config.vocab_size = state["lm_head.weight"].shape[0]
    model = Qwen2VLForConditionalGeneration(config).eval()
    renamed = {
        re.sub(r"^model\.", "model.language_model.", re.sub(r"^visual\.", "model.vis.", key)): value
        for key, value in state.items()
        if not key.startswith("rm_head.")
    }
    renamed = {
        key.replace("model.language_model.vis.", "model.visual."): value
        for key, value in renamed.items()
    }
    model.load_state_dict(renamed)
    ids, patches, grid = network.inputs(rgb, PROMPT)
    count = ids.shape[1]
    positions = torch.arange(count).expand(3, 1, count)
    options = {"position_ids": positions}
    if with_rows:
        options = {"mm_token_type_ids": (ids == config.image_token_id).int()}
    with torch.no_grad():
        hidden = model.model(
            input_ids=ids, pixel_values=patches, image_grid_thw=grid, **options
        ).last_hidden_state[0]
        vector = hidden[ids[0].tolist().index(config.text_config.vocab_size - 1)]
        for layer in (0, 3, 5):
            vector = state[f"rm_head.{layer}.weight"] @ vector + state[f"rm_head.{layer}.bias"]
            vector = vector.relu() if layer < 5 else vector
    return float(vector[0]), math.exp(float(vector[1]))


def test_mean_and_deviation_are_the_stock_backbones_with_positions_in_sequence(
    weights: Path, network: HpsV3
) -> None:
    rgb = picture(1)
    found = network(rgb, PROMPT)
    assert found == pytest.approx(stock(weights, network, rgb, with_rows=False), abs=2e-5)
    # Positions by the picture's rows and columns, Qwen2-VL's own way, are another number.
    assert found != pytest.approx(stock(weights, network, rgb, with_rows=True), abs=2e-5)


def test_prompt_and_pixels_move_the_score(network: HpsV3) -> None:
    scores = {
        network(picture(seed), prompt)[0] for seed in (1, 2) for prompt in (PROMPT, "a red leaf")
    }
    assert len(scores) == 4


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((4096, 4096), (448, 448)), ((2880, 5120), (336, 588)), ((60, 60), (448, 448))],
)
def test_any_picture_becomes_about_the_published_number_of_pixels(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    image = fitted(np.zeros((*size, 3), np.uint8))
    assert (image.height, image.width) == wanted
    assert abs(image.height * image.width / PIXELS - 1) < 0.1


def test_the_conversation_is_the_published_one() -> None:
    text = conversation(PROMPT, 3)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>\nYou are tasked with"
    )
    assert text.endswith(
        f"original description.\nTextual prompt - {PROMPT}\n\n\n"
        "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "being the best. \n\n**Visual Quality:**  \nEvaluate" in text
    assert "lowest possible. \n\n**Text Alignment:**  \nAssess" in text


def test_a_prompt_with_a_control_token_is_refused(network: HpsV3) -> None:
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(ValueError, match=r"the prompt holds the control token"):
            network.inputs(picture(1), f"a lake {token}")


def test_the_metric_opens_from_the_weights_folder_with_both_numbers(
    weights: Path, network: HpsV3
) -> None:
    metric = open_metric("hpsv3", weights)
    # A process that only asks for names and digests must not hold 17 GB.
    assert isinstance(metric, DeferredMetric)
    assert "_loaded" not in vars(metric)
    found = metric.measure(picture(3), Picture(Path("a.png"), "0" * 64, prompt=PROMPT))
    assert (found["hpsv3"], found["hpsv3_sigma"]) == network(picture(3), PROMPT)


def test_what_is_missing_or_does_not_fit_is_said(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"hf download MizzenAI/HPSv3 HPSv3.safetensors"):
        open_metric("hpsv3", tmp_path)
    texts = weights / "qwen2-vl-7b-texts"
    state = load_file(weights / "hpsv3" / CHECKPOINT)
    damaged = {
        "rm_head.5.bias": "reward head",
        "model.norm.weight": "1 parameters are missing",
    }
    for key, message in damaged.items():
        file = tmp_path / CHECKPOINT
        save_file({name: value for name, value in state.items() if name != key}, file)
        with pytest.raises(ValueError, match=message):
            HpsV3(file, texts, "cpu")
    save_file(state | {"model.other": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="1 unknown parameters"):
        HpsV3(tmp_path / CHECKPOINT, texts, "cpu")
