"""The sets of text encoders, one for each backbone, behind the same four calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.models.sd3.text_encoders import (
    SD3_FOLDERS,
    build_tiny_sd3_text_encoders,
    encode_sd3_prompts,
    load_sd3_text_encoders,
)
from components.models.text_encoders import (
    FOLDERS,
    build_tiny_text_encoders,
    encode_prompts,
    load_text_encoders,
)

# What only SD3 has, as a folder and as a component of its pipeline.
_SD3_PART = "text_encoder_3"


@dataclass(frozen=True)
class TextFamily:
    """How one backbone's text becomes (states (B, L, D), pooled vectors (B, P))."""

    folders: tuple[str, ...]
    """Parts of the layout, tokenizers first; also the attributes of loaded encoders."""
    negative_prompt: str | None
    """What classifier-free guidance contrasts a prompt with; None: guidance is an input of the
    transformer."""
    build_tiny: Callable[..., Any]
    load: Callable[..., Any]
    encode: Callable[..., Any]

    def models(self, encoders: Any) -> list[Any]:
        """The networks among loaded encoders."""
        return [getattr(encoders, name) for name in self.folders if "tokenizer" not in name]


TEXT_FAMILIES = {
    "flux": TextFamily(
        folders=FOLDERS,
        negative_prompt=None,
        build_tiny=build_tiny_text_encoders,
        load=load_text_encoders,
        encode=encode_prompts,
    ),
    "sd3": TextFamily(
        folders=SD3_FOLDERS,
        negative_prompt="",
        build_tiny=build_tiny_sd3_text_encoders,
        load=load_sd3_text_encoders,
        encode=encode_sd3_prompts,
    ),
}


def family_of(parts: Any) -> TextFamily:
    """Family of loaded encoders, or of a pipeline."""
    return TEXT_FAMILIES["sd3" if hasattr(parts, _SD3_PART) else "flux"]


def family_in(folder: Path) -> TextFamily:
    """Family whose encoders a folder holds."""
    return TEXT_FAMILIES["sd3" if (folder / _SD3_PART).is_dir() else "flux"]
