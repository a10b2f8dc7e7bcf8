"""Validation prompts of one's own: embedded once, before training, by the text store's encoders.

They lie in the state's folder and not in the text store: another prompt to look at is no reason
for a store, or a run, of another identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.files.whole_files import whole_file
from components.models.backbones import BACKBONES
from components.models.loading.quantisation import quantise
from components.settings.models import Quantisation
from components.training.encoding.embedded_captions import encoders_digest
from components.training.stores.text_store import TextStore, caption_sha256

_FILE = "own_prompts.safetensors"
_KEY = "key"


def prompt_id(prompt: str) -> str:
    """Name of a prompt among image ids, which are hexadecimal."""
    return f"prompt:{caption_sha256(prompt)}"


def embed_own_prompts(
    prompts: Sequence[str], texts: Path, encoders: Path | None, backbone: str, folder: Path
) -> str | None:
    """Embed prompts as the captions of a text store were, unless `folder` holds them already.

    Args:
        prompts: what to embed.
        texts: the text store.
        encoders: that made it; None: not known.
        backbone: whose text they encode.
        folder: gets the file; of a run.

    Returns:
        why the encoders of the store cannot be had, in one clause; None: the prompts are there.
    """
    prompts = list(dict.fromkeys(prompts))
    store = TextStore(texts)
    wanted = str(store.index["encoder_digest"].iloc[0])
    key = hashlib.sha256(json.dumps([wanted, store.tokens, prompts]).encode()).hexdigest()
    file = folder / _FILE
    if _key_of(file) == key:
        return None
    family = BACKBONES[backbone].text_family()
    if encoders is None or not all((encoders / name).is_dir() for name in family.folders):
        return "the text encoders (models.text_encoders.pretrained) are not there"
    # Rounded or not is part of the store's identity; a prompt is embedded as its captions were.
    rounding = next(
        (
            kind
            for kind in get_args(Quantisation)
            if encoders_digest(encoders, family, kind) == wanted
        ),
        None,
    )
    if rounding is None:
        return (
            "the text encoders (models.text_encoders.pretrained) are not those that made the text "
            "embeddings"
        )
    length = int(store.about["provenance"]["max_sequence_length"])
    # Gone when this returns, and with them the memory that training wants.
    loaded = family.load(encoders)
    for model in family.models(loaded):
        quantise(model, rounding, dtype=torch.float32, device="cpu")
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for prompt in prompts:
            text, pooled = family.encode(loaded, [prompt], length)
            tensors[f"{prompt_id(prompt)}.text"] = text[0].contiguous()
            tensors[f"{prompt_id(prompt)}.pooled"] = pooled[0].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(file, contended=True) as temporary:
        save_file(tensors, temporary, metadata={_KEY: key})
    return None


def read_own_prompts(prompts: Sequence[str], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(text states (L, D), pooled (P,)) by `prompt_id`; without those that were not embedded."""
    file = folder / _FILE
    if not prompts or not file.is_file():
        return {}
    tensors = load_file(file)
    return {
        name: (tensors[f"{name}.text"], tensors[f"{name}.pooled"])
        for name in map(prompt_id, prompts)
        if f"{name}.text" in tensors
    }


def _key_of(file: Path) -> str | None:
    """What a file of embedded prompts was made from; None: there is none."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        key: str | None = (opened.metadata() or {}).get(_KEY)
    return key
