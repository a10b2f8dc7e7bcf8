"""How many captions the text encoders of these settings will cut, said before anything is trained.

At a prompt, without the stage::

    cuts = encoder_cuts(captions, load_settings(Path("params.yaml")))
    print(describe(cuts))
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from components.models.backbones import BACKBONES
from components.models.text_lengths import (
    TextLength,
    load_text_limits,
    text_lengths,
    train_text_limits,
)
from components.settings.schema import Settings

# Tiny tokenizers are trained on this many captions: enough for their small vocabulary.
_TRAINING_CAPTIONS = 500


def encoder_cuts(
    captions: Iterable[str], settings: Settings, root: Path = Path()
) -> dict[str, TextLength]:
    """Captions against the limit of each encoder.

    Args:
        captions: of the rows that are kept, at least one; read once.
        settings: `models.text_encoders` and the backbone, which says which encoders there are.
        root: where a relative folder starts.

    Returns:
        "T5" and "CLIP"; empty where the named folder holds no tokenizers (yet). Without a folder
        the tokenizers are trained here on these captions, as the tiny encoders' will be on those of
        the training slice: an estimate.
    """
    encoders = settings.models.text_encoders
    backbone = BACKBONES[settings.models.transformer.backbone]
    length = encoders.max_sequence_length
    if encoders.pretrained is not None:
        limits = load_text_limits(backbone, root / encoders.pretrained, length)
    else:
        captions = iter(captions)
        sample = list(islice(captions, _TRAINING_CAPTIONS))
        captions = chain(sample, captions)
        limits = train_text_limits(backbone, sample, encoders.tiny.vocab_size, length)
    return {} if limits is None else text_lengths(limits, captions)
