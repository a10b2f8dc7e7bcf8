"""Q-Align: image quality from 1 to 5, read off the logits of five level words.

Q-Align (Wu et al., 2023; checkpoint q-future/one-align, mPLUG-Owl2 with 8.2 billion parameters) is
asked to complete "The quality of the image is"; its score is the expectation of 5 to 1 under the
softmax over excellent, good, fair, poor and bad. The network comes from pyiqa's modules (extra
`iqa`, PolyForm-Noncommercial), which are imported only when a model is loaded, in a worker process:
they replace parts of transformers' Llama for the whole process.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.corpus.decoding import decode_rgb
from components.corpus.derivatives import Derivative
from components.models.weights import WeightsMissing

SCORER = "qalign-one-align"
LEVELS = ("excellent", "good", "fair", "poor", "bad")
LEVEL_VALUES = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
INPUT_PX = 448
COMMAND = "hf download q-future/one-align --local-dir weights/one-align"

# OpenAI CLIP's statistics.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

QALIGN_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("quality_score", pa.float64()),
        ("quality_scorer", pa.string()),
        ("quality_weights", pa.string()),
        ("error", pa.string()),
    ]
)


def score_from_logits(logits: np.ndarray) -> float:
    """Expectation of 5 to 1 under the softmax of the level words' logits, in float64.

    Args:
        logits: (5,), in the order of `LEVELS`.

    Raises:
        ValueError: another shape, or logits that are not finite.
    """
    values = np.asarray(logits, np.float64)
    if values.shape != (len(LEVELS),) or not np.isfinite(values).all():
        raise ValueError(f"logits: expected {len(LEVELS)} finite numbers, got {values.shape}")
    weights = np.exp(values - values.max())
    return float(weights @ LEVEL_VALUES / weights.sum())


@cache
def _processor() -> Any:
    """CLIP's image processor with one-align's preprocessor_config.json."""
    from transformers import CLIPImageProcessor

    size = {"height": INPUT_PX, "width": INPUT_PX}
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=_MEAN, image_std=_STD)


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Pad to a square with CLIP's mean colour, scale to 448x448 (bicubic), normalise.

    Args:
        pixels: (H, W, 3) uint8, RGB.

    Returns:
        (1, 3, 448, 448) float32.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    edge = max(height, width)
    square = Image.new("RGB", (edge, edge), tuple(int(value * 255) for value in _MEAN))
    square.paste(Image.fromarray(pixels), ((edge - width) // 2, (edge - height) // 2))
    return np.asarray(_processor().preprocess(square, return_tensors="np")["pixel_values"])


def check_weights(folder: Path | None) -> Path:
    """The folder of one-align.

    The published checkpoint is pickled, so `resolve_folder`, which wants safetensors, does not
    apply; torch reads it with weights_only.

    Raises:
        WeightsMissing: no configuration or no weights there.
    """
    if folder is None or not (folder / "config.json").is_file():
        raise WeightsMissing(
            "Q-Align weights (quality.qalign_weights)", folder or "(no folder set)", COMMAND
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise WeightsMissing("Q-Align weights", folder, COMMAND, "config.json without weights")
    return folder


def _model_class() -> Any:
    """The mPLUG-Owl2 of pyiqa, with what transformers 5 took away put back.

    Raises:
        WeightsMissing: the extra is not installed.
    """
    try:
        from pyiqa.archs.q_align.modeling_mplug_owl2 import MPLUGOwl2LlamaForCausalLM
        from pyiqa.archs.q_align.visual_encoder import MplugOwlVisualAbstractorModel
    except ModuleNotFoundError as problem:
        raise WeightsMissing(
            "pyiqa",
            "this Python environment",
            "pip install 'ultraflux-mlops[iqa]' (PolyForm-Noncommercial)",
            str(problem),
        ) from None

    def invert_attention_mask(self: Any, mask: Any) -> Any:
        """1 where a token counts -> 0, else the dtype's minimum, broadcast over heads."""
        import torch

        wide = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
        wide = wide.to(dtype=self.dtype)
        return (1.0 - wide) * torch.finfo(self.dtype).min

    if not hasattr(MplugOwlVisualAbstractorModel, "invert_attention_mask"):
        MplugOwlVisualAbstractorModel.invert_attention_mask = invert_attention_mask
    return MPLUGOwl2LlamaForCausalLM


class QAlign:
    """The network and the five logits that matter."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load from a local folder; half precision on a GPU, float32 elsewhere.

        Raises:
            WeightsMissing: no weights, or no pyiqa.
        """
        import sys

        import torch
        import transformers

        model_class = _model_class()
        module = sys.modules[model_class.__module__]
        # Its constructor names the hub; the tokenizer and processor lie beside the weights.
        module.LlamaTokenizer = _Local(transformers.LlamaTokenizer, folder)  # type: ignore[attr-defined]
        module.CLIPImageProcessor = _Local(transformers.CLIPImageProcessor, folder)  # type: ignore[attr-defined]
        self._dtype = torch.float16 if device == "cuda" else torch.float32
        self._device = device
        model = model_class.from_pretrained(folder, dtype=self._dtype, local_files_only=True)
        self._model = model.eval().to(device)
        # pyiqa makes this tensor in half precision, which a float32 softmax cannot meet.
        self._model.weight_tensor = torch.tensor(LEVEL_VALUES, dtype=self._dtype, device=device)

    def __call__(self, pixels: np.ndarray) -> float:
        """Score of (H, W, 3) uint8 RGB, 1 to 5."""
        import torch

        values = torch.from_numpy(preprocess(pixels)).to(self._device, self._dtype)
        answer = self._model.score(None, image_tensor=values, return_dict=True)
        return score_from_logits(answer["logits"][0].float().cpu().numpy())


class _Local:
    """A class of transformers whose `from_pretrained` always reads one folder."""

    def __init__(self, of: Any, folder: Path) -> None:
        self._of = of
        self._folder = folder

    def from_pretrained(self, name: str, **_: Any) -> Any:
        """The folder's object, whatever the name."""
        return self._of.from_pretrained(self._folder, local_files_only=True)


# Once per worker.
_load = cache(QAlign)


def score_derivative(
    derivative: Derivative, *, folder: Path, digest: str, device: str
) -> dict[str, Any]:
    """A row of `QALIGN_SCHEMA` for one derivative."""
    score = _load(folder, device)(decode_rgb(derivative.jpeg).pixels)
    return {"quality_score": score, "quality_scorer": SCORER, "quality_weights": digest}
