"""CLIP and T5 text encoders: load a Flux folder, or build tiny ones with their own tokenizers.

Folder layout as in FLUX.1-dev: `tokenizer` and `text_encoder` are CLIP's, `tokenizer_2` and
`text_encoder_2` are T5's. Nothing here needs a network.
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
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from components.files.install_hints import download_command
from components.files.safetensors_header import SPEC, describe_file
from components.files.weight_folders import WeightsMissing, resolve_folder
from components.models.backbone import TextFamily
from components.models.checkpoint_files import WeightsBroken, folder_shapes
from components.models.tiny_tokenizers import (
    CLIP_CONTEXT,
    train_clip_tokenizer,
    train_t5_tokenizer,
    training_text,
)

# Tokenizers first: loaders look for the first half before they open any weights.
FOLDERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
DOWNLOAD = download_command(
    "black-forest-labs/FLUX.1-dev",
    "weights/FLUX.1-dev",
    include=("tokenizer*/*", "text_encoder*/*"),
)


@dataclass(frozen=True)
class TextEncoders:
    """The four text components of a Flux pipeline, under diffusers' names."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel


def train_tokenizers(
    captions: Sequence[str], out_dir: str | Path, *, vocab_size: int = 1000
) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Train both tokenizers and save them as `tokenizer` (CLIP) and `tokenizer_2` (T5).

    Args:
        captions: training text, at least one non-empty string; the same captions in the same
            order give the same files.
        out_dir: parent folder.
        vocab_size: wanted size of each vocabulary.

    Returns:
        (CLIP tokenizer, T5 tokenizer).

    Raises:
        ValueError: no text.
    """
    texts = training_text(captions)
    clip, t5 = train_clip_tokenizer(texts, vocab_size), train_t5_tokenizer(texts, vocab_size)
    clip.save_pretrained(Path(out_dir) / "tokenizer")
    t5.save_pretrained(Path(out_dir) / "tokenizer_2")
    return clip, t5


def _heads(width: int) -> int:
    """Heads of 16 channels where the width allows it."""
    return next(heads for heads in (max(width // 16, 1), 4, 2, 1) if width % heads == 0)


def tiny_clip_config(tokenizer: CLIPTokenizer, width: int, num_layers: int) -> CLIPTextConfig:
    """CLIP text configuration of a width, for a tokenizer of ours."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=_heads(width),
        max_position_embeddings=CLIP_CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        # transformers pools at the first token with this id: another one would pool at the wrong
        # place.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_t5_config(tokenizer: T5TokenizerFast, width: int, num_layers: int) -> T5Config:
    """T5 configuration of a width, for a tokenizer of ours."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        # T5 does not derive it from the width: its default is 64 a head.
        d_kv=width // _heads(width),
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=_heads(width),
        # As T5 v1.1, which Flux uses; the planner's closed form counts the gate's third matrix.
        feed_forward_proj="gated-gelu",
        # Embeddings must be the same every time, whatever mode somebody leaves the encoder in.
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )


def build_tiny_text_encoders(
    out_dir: str | Path,
    captions: Sequence[str],
    *,
    seed: int = 0,
    t5_dim: int = 64,
    clip_dim: int = 64,
    vocab_size: int = 1000,
    num_layers: int = 2,
) -> TextEncoders:
    """Random two-layer CLIP and T5 encoders with tokenizers trained on the captions, saved.

    Args:
        out_dir: gets the four folders of the layout.
        captions: training text of the tokenizers.
        seed: of the weights; the global random state is untouched.
        t5_dim: width of the T5 embeddings.
        clip_dim: width of the CLIP embedding.
        vocab_size: wanted size of each vocabulary.
        num_layers: layers of each encoder.

    Returns:
        The encoders in evaluation mode.
    """
    clip_tokenizer, t5_tokenizer = train_tokenizers(captions, out_dir, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # CLIP before T5: both draw from one seeded stream, so the order is part of the seed's
        # meaning.
        clip = CLIPTextModel(tiny_clip_config(clip_tokenizer, clip_dim, num_layers)).eval()
        t5 = T5EncoderModel(tiny_t5_config(t5_tokenizer, t5_dim, num_layers)).eval()
    for model, name in ((clip, "text_encoder"), (t5, "text_encoder_2")):
        folder = Path(out_dir) / name
        model.save_pretrained(folder)
        about = {
            **SPEC,
            "modelspec.architecture": type(model).__name__,
            "modelspec.implementation": "transformers",
            "modelspec.title": f"UltraFlux tiny {name}, random weights of seed {seed}",
            "modelspec.license": "apache-2.0",
            "modelspec.tags": "ultraflux, text encoder, random",
        }
        describe_file(folder / "model.safetensors", about)
    return TextEncoders(clip_tokenizer, t5_tokenizer, clip, t5)


def load_text_encoders(
    folder: str | Path | None, *, dtype: torch.dtype = torch.float32
) -> TextEncoders:
    """Load the four components of a FLUX.1-dev style folder, never from a hub.

    Args:
        folder: parent of `tokenizer`, `tokenizer_2`, `text_encoder`, `text_encoder_2`.
        dtype: of the weights.

    Returns:
        The encoders in evaluation mode.

    Raises:
        WeightsMissing: a part is not there; names it and the command that gets it.
        WeightsBroken: a file cannot be read, or does not hold the encoder's tensors.
    """
    if folder is None:
        raise WeightsMissing("Flux text encoders", "(no folder set)", DOWNLOAD)
    root = Path(folder).expanduser()
    # The tokenizers here; `load_encoder` checks the networks.
    for name in FOLDERS[:2]:
        if not (root / name / "tokenizer_config.json").is_file():
            raise WeightsMissing(f"Flux {name}", root / name, DOWNLOAD)

    def load(name: str, kind: Any, part: str) -> Any:
        return load_encoder(kind, root / part, f"Flux {name} text encoder", DOWNLOAD, dtype)

    return TextEncoders(
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
        tokenizer_2=T5TokenizerFast.from_pretrained(root / "tokenizer_2", local_files_only=True),
        text_encoder=load("CLIP", CLIPTextModel, "text_encoder"),
        text_encoder_2=load("T5", T5EncoderModel, "text_encoder_2"),
    )


def load_encoder(kind: Any, path: Path, what: str, command: str, dtype: torch.dtype) -> Any:
    """One encoder in evaluation mode; transformers itself would only warn about lost weights.

    Args:
        kind: transformers class.
        path: its folder.
        what: name of the weights for messages.
        command: how to get them.
        dtype: of the weights.

    Raises:
        WeightsMissing: it is not there.
        WeightsBroken: a file cannot be read, or does not hold the encoder's tensors.
    """
    folder = resolve_folder(path, what, command)
    # For what it refuses (pickled, truncated or missing shards); encoders' names are checked below.
    folder_shapes(folder, what, command)
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except RuntimeError as problem:
        raise WeightsBroken(f"{folder}: {' '.join(str(problem).split())[:300]}") from None
    # Only what the encoder would lack counts: a file may hold more than this class reads.
    for kind_of_problem in ("missing_keys", "mismatched_keys"):
        if lost := sorted(str(key) for key in report[kind_of_problem]):
            names = ", ".join(lost[:3])
            raise WeightsBroken(f"{folder}: {len(lost)} {kind_of_problem} ({names})")
    return model.eval()


@torch.no_grad()
def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], max_sequence_length: int = 512
) -> tuple[Tensor, Tensor]:
    """Embed prompts as FluxPipeline does: padded, without attention mask (tested equal).

    Flux attends all padded T5 positions, so the length is part of the model's input.

    Args:
        encoders: the text components.
        prompts: B strings.
        max_sequence_length: T5 tokens L; longer prompts are cut.

    Returns:
        (T5 embeddings (B, L, D), pooled CLIP embedding (B, P)), in the encoders' dtypes.
    """
    texts = list(prompts)
    # Padded to the full length and not trimmed: another number of positions is another embedding.
    t5_tokens = encoders.tokenizer_2(
        texts,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    clip_tokens = encoders.tokenizer(
        texts,
        padding="max_length",
        max_length=encoders.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    # With offloading the weights wait elsewhere (on the CPU or the meta device).
    t5_device = get_module_execution_device(encoders.text_encoder_2)
    clip_device = get_module_execution_device(encoders.text_encoder)
    t5 = encoders.text_encoder_2(t5_tokens.to(t5_device))[0]
    pooled = encoders.text_encoder(clip_tokens.to(clip_device)).pooler_output
    return t5, pooled


FLUX_TEXT = TextFamily(
    folders=FOLDERS,
    negative_prompt=None,
    build_tiny=build_tiny_text_encoders,
    load=load_text_encoders,
    encode=encode_prompts,
)
