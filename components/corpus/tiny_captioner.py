"""A small random captioning model in Qwen2-VL's architecture, for tests and for trying out.

Classes, files and chat template are those of a Qwen2-VL folder; widths and depths are tiny and the
weights random. It says twelve English words or however many it is asked for, which depend on the
picture and mean nothing: they show that the way to captions works.
"""

from __future__ import annotations

from pathlib import Path

_WIDTH = 32
_PATCH_PX = 14
_IMAGE, _VIDEO = "<|image_pad|>", "<|video_pad|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_START, _END = "<|im_start|>", "<|im_end|>"
_SPECIAL = ("<|endoftext|>", _START, _END, _VISION_START, _VISION_END, _IMAGE, _VIDEO)
# As in Qwen2-VL, without tools and videos.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# All that it can say; none of them leaves a sentence open.
_TEXT = (
    " calm lake red hill blue boat grey bridge warm meadow bright river pale village dark tree"
    " golden field narrow path rocky shore misty cloud tall tower soft grass wide harbour smooth"
    " stone cold snow green valley quiet street old house white horse small garden"
)
_WORDS = tuple(f" {word}" for word in _TEXT.split())
# Large enough that two pictures do not get the same words.
_INITIALIZER_RANGE = 0.5


def write_tiny_captioner(folder: Path, seed: int) -> None:
    """Write config, safetensors, tokenizer, processor and chat template of a Qwen2-VL.

    Args:
        folder: made when it is not there.
        seed: of the random weights.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        Qwen2Tokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    # Every byte, and a few words: all others are spelled.
    vocabulary = {
        byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=_END,
        pad_token=_SPECIAL[0],
        unk_token=None,
        extra_special_tokens=list(_SPECIAL),
    )
    tokenizer.add_tokens(list(_WORDS))
    pixels = {"min_pixels": (2 * _PATCH_PX) ** 2, "max_pixels": (8 * _PATCH_PX) ** 2}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=_PATCH_PX, merge_size=2, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=_PATCH_PX, merge_size=2, **pixels),
        chat_template=_CHAT_TEMPLATE,
    )
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": _INITIALIZER_RANGE,
            # Of 8 pairs of channels a head has: time, height, width.
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "bos_token_id": token(_SPECIAL[0]),
            "eos_token_id": token(_END),
        },
        vision_config={
            "depth": 1,
            "embed_dim": _WIDTH,
            "hidden_size": _WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": _PATCH_PX,
            "spatial_merge_size": 2,
            "initializer_range": _INITIALIZER_RANGE,
        },
        image_token_id=token(_IMAGE),
        video_token_id=token(_VIDEO),
        vision_start_token_id=token(_VISION_START),
        vision_end_token_id=token(_VISION_END),
    )
    # The caller's own draws must not depend on whether a tiny model was made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    sampling = model.generation_config
    sampling.eos_token_id = sampling.forced_eos_token_id = token(_END)
    sampling.pad_token_id = tokenizer.pad_token_id
    # What a trained model has learnt: words instead of bytes, none twice in a row, and an end.
    spoken = {*token(list(_WORDS)), token(_END)}
    sampling.suppress_tokens = [n for n in range(len(tokenizer)) if n not in spoken]
    sampling.no_repeat_ngram_size = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
