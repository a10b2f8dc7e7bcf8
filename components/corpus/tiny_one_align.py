"""A small random checkpoint in Q-Align's architecture, for tests and for trying a pipeline out.

The classes, parameter names, prompt and files are those of q-future/one-align; widths and depths
are tiny and the weights random, so its scores mean nothing, only that the way to them works. Needs
the extra `iqa`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from components.corpus.quality.qalign import INPUT_PX, LEVELS, PROMPT, build_model, image_processor

_VOCABULARY = 400
_WIDTH = 32
_VISION_PATCH_PX = 56
_GRID = INPUT_PX // _VISION_PATCH_PX
_QUERIES = 4
# Large enough that two photographs do not get the same score up to float32's last digits.
_INITIALIZER_RANGE = 0.2


def _tokenizer_model() -> bytes:
    """A byte-fallback BPE of sentencepiece with Llama's special ids, in which a level is a token.

    The prompt and the levels are all the text there is; every level stands often enough to become
    one piece, as in Llama's vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    # Without line breaks, which fall back to a byte as in Llama's vocabulary.
    prompt = "".join(PROMPT).split("\n")
    levels = [f"The quality is {level}" for level in LEVELS for _ in range(20)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*prompt, *levels]),
        model_writer=model,
        model_type="bpe",
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tiny_one_align(folder: Path, seed: int) -> None:
    """Write config, safetensors, tokenizer and processor; the same seed gives the same weights.

    Args:
        folder: made when it is not there.
        seed: of the random weights.

    Raises:
        WeightsMissing: the extra `iqa` is not installed.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_tokenizer_model())
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    image_processor().save_pretrained(folder)
    tower = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": _INITIALIZER_RANGE,
    }
    vision = {**tower, "image_size": INPUT_PX, "patch_size": _VISION_PATCH_PX}
    abstractor = {
        **tower,
        "num_learnable_queries": _QUERIES,
        "encoder_hidden_size": _WIDTH,
        "grid_size": _GRID,
    }
    language = {
        **tower,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 256,
        "visual_config": {"visual_model": vision, "visual_abstractor": abstractor},
    }
    # The caller's own draws must not depend on whether a tiny model was made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_model(folder, language).save_pretrained(folder)
