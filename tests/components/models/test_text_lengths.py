"""What text encoders cut is counted exactly as they cut it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.models.backbones import BACKBONES
from components.models.text_lengths import (
    TextLength,
    as_json,
    describe,
    load_text_limits,
    text_lengths,
    text_limits,
    train_text_limits,
)
from components.models.tiny_tokenizers import train_clip_tokenizer, train_t5_tokenizer

CAPTIONS = [" ".join(["a", "calm", "lake"] * n) for n in (1, 5, 40)]


@pytest.mark.parametrize("backbone", ["flux", "sd3"])
def test_a_caption_is_cut_when_the_encoder_drops_a_token_of_it(
    tmp_path: Path, backbone: str
) -> None:
    chosen = BACKBONES[backbone]
    t5 = chosen.t5_part.replace("text_encoder", "tokenizer")
    tokenizers = {
        "tokenizer": train_clip_tokenizer(CAPTIONS, 600),
        t5: train_t5_tokenizer(CAPTIONS, 300),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
    limits = load_text_limits(chosen, tmp_path, 16)
    assert limits is not None
    found = text_lengths(limits, CAPTIONS)
    for name, tokenizer, limit in (
        ("T5", tokenizers[t5], 16),
        ("CLIP", tokenizers["tokenizer"], 77),
    ):
        whole = [len(tokenizer(text).input_ids) for text in CAPTIONS]
        cut = [
            len(tokenizer(text, truncation=True, max_length=limit).input_ids) for text in CAPTIONS
        ]
        dropped = sum(one < other for one, other in zip(cut, whole, strict=True))
        assert found[name] == TextLength(limit, 3, dropped, max(whole))
        # A caption of exactly the limit is whole.
        exact = {name: (tokenizer, whole[1])}
        assert text_lengths(exact, CAPTIONS[:2])[name].cut == 0
    assert found["T5"].cut > 0
    assert found == text_lengths(text_limits(chosen, tokenizers, 16), iter(CAPTIONS))


def test_a_folder_without_tokenizers_gives_no_figure(tmp_path: Path) -> None:
    assert load_text_limits(BACKBONES["flux"], tmp_path, 16) is None
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{")
    assert load_text_limits(BACKBONES["flux"], tmp_path, 16) is None


def test_tiny_tokenizers_are_trained_on_the_captions_themselves() -> None:
    found = text_lengths(train_text_limits(BACKBONES["flux"], CAPTIONS, 300, 16), CAPTIONS)
    assert (found["T5"].limit, found["CLIP"].limit) == (16, 77)
    assert found["T5"].captions == found["CLIP"].captions == 3
    json.dumps(as_json(found))


def test_only_what_is_cut_is_said() -> None:
    lengths = {"T5": TextLength(64, 11, 9, 190), "CLIP": TextLength(77, 11, 0, 60)}
    assert describe(lengths) == "T5 cuts 9 of 11 captions at 64 tokens (the longest has 190)"
    assert describe({}) == ""


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys; from components.models.text_lengths import text_lengths, train_text_limits;"
        "from components.models.backbones import BACKBONES;"
        "train_text_limits(BACKBONES['flux'], ['a calm lake'], 300, 16);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
