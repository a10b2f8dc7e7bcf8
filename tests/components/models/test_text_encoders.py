"""Text encoders: deterministic tokenizers, saved layout, equality with FluxPipeline."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from components.files.weight_folders import WeightsMissing, folder_digest
from components.models.pipeline import UltraFluxPipeline
from components.models.text_encoders import (
    TextEncoders,
    build_tiny_text_encoders,
    encode_prompts,
    load_text_encoders,
)
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.models.tiny_tokenizers import learn_merges

CAPTIONS = [
    "A frozen lake under pale morning light, with snow-covered mountains in the distance.",
    "A narrow street at dusk; warm lamps glow above wet cobblestones and closed shutters.",
    "晨光下结冰的湖面，远处是积雪的群山。",
    "Close view of red cherry leaves, each vein sharp against a dark and blurred background.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders")
    build_tiny_text_encoders(path, CAPTIONS, seed=1, t5_dim=32, clip_dim=48, vocab_size=700)
    return path


@pytest.fixture(scope="module")
def encoders(folder: Path) -> TextEncoders:
    return load_text_encoders(folder)


def test_most_frequent_pair_is_merged_first_and_ties_go_to_the_smaller_pair() -> None:
    words = Counter({("a", "b", "c"): 2, ("b", "c"): 1, ("x", "y"): 2})
    assert learn_merges(words, 9) == [("b", "c"), ("a", "bc"), ("x", "y")]


@pytest.mark.slow
def test_a_second_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from components.models.text_encoders import build_tiny_text_encoders as b;"
        f"b(sys.argv[1], {CAPTIONS!r}, seed=1, t5_dim=32, clip_dim=48, vocab_size=700)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert folder_digest(tmp_path) == folder_digest(folder)


def test_tokenizers_round_trip_captions_and_have_the_classes_layouts(
    encoders: TextEncoders,
) -> None:
    t5 = encoders.tokenizer_2
    assert t5.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    for caption in CAPTIONS:
        tokens = t5(caption).input_ids
        assert tokens[-1] == 1
        assert 2 not in tokens
        assert t5.decode(tokens, skip_special_tokens=True) == caption
    clip = encoders.tokenizer
    tokens = clip("red leaves, Zürich").input_ids
    assert (tokens[0], tokens[-1]) == (len(clip) - 2, len(clip) - 1)
    assert clip.decode(tokens, skip_special_tokens=True) == "red leaves , zürich"
    assert clip.model_max_length == 77


@torch.no_grad()
def test_embeddings_equal_those_of_flux_pipeline(encoders: TextEncoders) -> None:
    pipeline = UltraFluxPipeline.from_components(
        build_tiny_autoencoder(),
        build_tiny_transformer(joint_attention_dim=32, pooled_projection_dim=48),
        encoders,
    )
    prompts = [CAPTIONS[0], "", CAPTIONS[1] * 8]
    t5, pooled = encode_prompts(encoders, prompts, max_sequence_length=40)
    expected_t5, expected_pooled, text_ids = pipeline.encode_prompt(
        prompts, None, max_sequence_length=40
    )
    assert t5.shape == (3, 40, 32)
    assert pooled.shape == (3, 48)
    assert text_ids.shape == (40, 3)
    assert torch.equal(t5, expected_t5)
    assert torch.equal(pooled, expected_pooled)
    assert not torch.allclose(pooled[0], pooled[2])


def test_missing_parts_are_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"tokenizer not found at .*hf download") as raised:
        load_text_encoders(tmp_path)
    assert raised.value.name == "Flux tokenizer"
    with pytest.raises(WeightsMissing, match="no folder set"):
        load_text_encoders(None)
    with pytest.raises(ValueError, match="captions"):
        build_tiny_text_encoders(tmp_path, ["  "])
