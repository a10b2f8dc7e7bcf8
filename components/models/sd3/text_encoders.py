"""SD3's text encoders: T5 and two CLIPs; load a folder, or build tiny ones with own tokenizers.

Folder layout as in stable-diffusion-3-medium-diffusers: `tokenizer`, `tokenizer_2` and
`text_encoder`, `text_encoder_2` are the CLIPs', `tokenizer_3` and `text_encoder_3` are T5's.

The transformer reads one sequence: 77 positions with the two CLIPs' states side by side, filled up
with zeros to T5's width, then T5's positions. The pooled vector is the two projected ones in a row.
So the text store holds them like Flux' two tensors, with other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from components.files.install_hints import download_command
from components.files.weight_folders import WeightsMissing
from components.models.backbone import TextFamily
from components.models.text_encoders import (
    load_encoder,
    tiny_clip_config,
    tiny_t5_config,
)
from components.models.tiny_tokenizers import (
    train_clip_tokenizer,
    train_t5_tokenizer,
    training_text,
)

# Tokenizers first, like `FOLDERS`; the order is also that of `Sd3TextEncoders`' fields.
SD3_FOLDERS = (
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
SD3_DOWNLOAD = download_command(
    "stabilityai/stable-diffusion-3-medium-diffusers",
    "weights/stable-diffusion-3-medium",
    include=("tokenizer*/*", "text_encoder*/*"),
)


@dataclass(frozen=True)
class Sd3TextEncoders:
    """The six text components of an SD3 pipeline, under diffusers' names."""

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: T5TokenizerFast
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel


def build_tiny_sd3_text_encoders(
    out_dir: str | Path,
    captions: Sequence[str],
    *,
    seed: int = 0,
    t5_dim: int = 64,
    clip_dim: int = 64,
    vocab_size: int = 1000,
    num_layers: int = 2,
) -> Sd3TextEncoders:
    """Random encoders with tokenizers trained on the captions, saved.

    Args:
        out_dir: gets the six folders of the layout.
        captions: training text of the tokenizers.
        seed: of the weights; the global random state is untouched.
        t5_dim: width of T5's states, at least `clip_dim`.
        clip_dim: even; each CLIP is half as wide, so that the pooled vector has this width.
        vocab_size: wanted size of each vocabulary.
        num_layers: layers of each encoder, at least 2 (the states are those before the last).

    Returns:
        The encoders in evaluation mode.

    Raises:
        ValueError: no text, or widths that do not fit.
    """
    # Wider CLIPs would make the padding negative, which silently cuts channels off.
    if clip_dim % 2 or clip_dim > t5_dim:
        raise ValueError(
            f"clip_dim: {clip_dim} must be even and at most t5_dim {t5_dim}: SD3 lays two CLIPs "
            "side by side into T5's width"
        )
    root, texts = Path(out_dir), training_text(captions)
    clip_tokenizer = train_clip_tokenizer(texts, vocab_size)
    t5_tokenizer = train_t5_tokenizer(texts, vocab_size)
    # Both of SD3's CLIPs have one vocabulary.
    tokenizers = (clip_tokenizer, clip_tokenizer, t5_tokenizer)
    # Both CLIPs of one width: SD3's differ, but the code paths are the same.
    clip_config = tiny_clip_config(clip_tokenizer, clip_dim // 2, num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # All three from one seeded stream: their order is part of the seed's meaning.
        encoders = (
            CLIPTextModelWithProjection(clip_config).eval(),
            CLIPTextModelWithProjection(clip_config).eval(),
            T5EncoderModel(tiny_t5_config(t5_tokenizer, t5_dim, num_layers)).eval(),
        )
    for name, part in zip(SD3_FOLDERS, (*tokenizers, *encoders), strict=True):
        part.save_pretrained(root / name)
    return Sd3TextEncoders(*tokenizers, *encoders)


def load_sd3_text_encoders(
    folder: str | Path | None, *, dtype: torch.dtype = torch.float32
) -> Sd3TextEncoders:
    """Load the six components of an SD3 folder, never from a hub.

    Args:
        folder: parent of `SD3_FOLDERS`.
        dtype: of the weights.

    Returns:
        The encoders in evaluation mode.

    Raises:
        WeightsMissing: a part is not there; names it and the command that gets it.
        WeightsBroken: a file cannot be read, or does not hold the encoder's tensors.
    """
    if folder is None:
        raise WeightsMissing("SD3 text encoders", "(no folder set)", SD3_DOWNLOAD)
    root = Path(folder).expanduser()
    # The tokenizers here; `load_encoder` checks the networks.
    for name in SD3_FOLDERS[:3]:
        if not (root / name / "tokenizer_config.json").is_file():
            raise WeightsMissing(f"SD3 {name}", root / name, SD3_DOWNLOAD)

    def load(kind: Any, name: str) -> Any:
        return load_encoder(kind, root / name, f"SD3 {name}", SD3_DOWNLOAD, dtype)

    return Sd3TextEncoders(
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
        tokenizer_2=CLIPTokenizer.from_pretrained(root / "tokenizer_2", local_files_only=True),
        tokenizer_3=T5TokenizerFast.from_pretrained(root / "tokenizer_3", local_files_only=True),
        text_encoder=load(CLIPTextModelWithProjection, "text_encoder"),
        text_encoder_2=load(CLIPTextModelWithProjection, "text_encoder_2"),
        text_encoder_3=load(T5EncoderModel, "text_encoder_3"),
    )


@torch.no_grad()
def encode_sd3_prompts(
    encoders: Sd3TextEncoders, prompts: Sequence[str], max_sequence_length: int = 512
) -> tuple[Tensor, Tensor]:
    """Embed prompts as StableDiffusion3Pipeline does (tested equal).

    Args:
        encoders: the text components, or a pipeline that has them.
        prompts: B strings.
        max_sequence_length: T5 tokens; longer prompts are cut.

    Returns:
        (joint states (B, 77 + max_sequence_length, D), pooled vector (B, P)).
    """
    # The first tokenizer's length serves both CLIPs, as in diffusers.
    context = encoders.tokenizer.model_max_length
    states, pooled = [], []
    for tokenizer, encoder in (
        (encoders.tokenizer, encoders.text_encoder),
        (encoders.tokenizer_2, encoders.text_encoder_2),
    ):
        output = encoder(_tokens(tokenizer, encoder, prompts, context), output_hidden_states=True)
        # The layer before the last, without its final norm, as SD3 was trained.
        states.append(output.hidden_states[-2])
        # The projected state of the end token; the unprojected one has another meaning for the
        # model.
        pooled.append(output.text_embeds)
    t5_tokens = _tokens(encoders.tokenizer_3, encoders.text_encoder_3, prompts, max_sequence_length)
    t5 = encoders.text_encoder_3(t5_tokens)[0]
    # 768 + 1280 channels side by side, zeros up to T5's 4096 (SD3-medium).
    clip = torch.cat(states, dim=-1)
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    # CLIPs before T5: the pipeline takes 77 off this length to find T5's.
    return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def _tokens(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    """(B, length) token ids on the encoder's device."""
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = batch.input_ids.to(get_module_execution_device(encoder))
    return ids


SD3_TEXT = TextFamily(
    folders=SD3_FOLDERS,
    # No guidance input, so guidance contrasts with the empty prompt.
    negative_prompt="",
    build_tiny=build_tiny_sd3_text_encoders,
    load=load_sd3_text_encoders,
    encode=encode_sd3_prompts,
    own_part="text_encoder_3",
)
