"""Q-Align: image quality from 1 to 5, read off the logits of five level words.

Q-Align (Wu et al., 2023; checkpoint q-future/one-align, mPLUG-Owl2 with 8.2 billion parameters) is
asked to complete "The quality of the image is"; its score is the expectation of 5 to 1 under the
softmax over excellent, good, fair, poor and bad. The network comes from pyiqa's modules (extra
`iqa`, PolyForm-Noncommercial), which are imported only when a model is loaded, in a worker process:
they replace parts of transformers' Llama for the whole process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from components.corpus.derivatives import Derivative
from components.corpus.quality import expectation
from components.corpus.quality.expectation import expected_value
from components.corpus.quality.kinds import Kind
from components.corpus.quality.scorer import (
    DerivativeScorer,
    ScoringJob,
    model_limits,
    score_row,
    score_schema,
)
from components.files.install_hints import download_command, install_hint
from components.files.weight_folders import WeightsMissing, folder_digest
from components.images.decoding import decode_rgb

SCORER = "qalign-one-align"
LEVELS = ("excellent", "good", "fair", "poor", "bad")
LEVEL_VALUES = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
INPUT_PX = 448
PROMPT = (
    "USER: How would you rate the quality of this image?\n",
    "\nASSISTANT: The quality of the image is",
)
"""What stands before and after the image (Q-Align's released code, task "quality")."""
COMMAND = download_command("q-future/one-align", "weights/one-align")

# OpenAI CLIP's statistics.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def score_from_logits(logits: np.ndarray) -> float:
    """Expectation of 5 to 1 under the softmax of the level words' logits, in float64.

    Args:
        logits: (5,), in the order of `LEVELS`.

    Raises:
        ValueError: another shape, or logits that are not finite.
    """
    return expected_value(logits, LEVEL_VALUES)


@cache
def image_processor() -> Any:
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
    return np.asarray(image_processor().preprocess(square, return_tensors="np")["pixel_values"])


def check_weights(folder: Path | None) -> Path:
    """The folder of one-align, looked at before any worker starts.

    The published checkpoint is pickled, so `resolve_folder`, which wants safetensors, does not
    apply; torch reads it with weights_only.

    Raises:
        WeightsMissing: a file is not there.
    """
    what = "Q-Align weights (quality.qalign_weights)"
    if folder is None:
        raise WeightsMissing(what, "(no folder set)", COMMAND)
    for name in ("config.json", "tokenizer.model"):
        if not (folder / name).is_file():
            raise WeightsMissing(what, folder / name, COMMAND)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise WeightsMissing(what, folder / "*.safetensors", COMMAND)
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
            f"{install_hint('iqa')} (PolyForm-Noncommercial)",
            str(problem),
        ) from None

    def invert_attention_mask(self: Any, mask: Any) -> Any:
        """1 where a token counts -> 0, else the dtype's minimum, broadcast over heads."""
        import torch

        wide = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
        wide = wide.to(dtype=self.dtype)
        return (1.0 - wide) * torch.finfo(self.dtype).min

    # Older transformers have it: then theirs is used.
    if not hasattr(MplugOwlVisualAbstractorModel, "invert_attention_mask"):
        MplugOwlVisualAbstractorModel.invert_attention_mask = invert_attention_mask
    return MPLUGOwl2LlamaForCausalLM


class _Local:
    """A class of transformers whose `from_pretrained` always reads one folder."""

    def __init__(self, of: Any, folder: Path) -> None:
        self._of = of
        self._folder = folder

    def from_pretrained(self, name: str, **_: Any) -> Any:
        """The folder's object, whatever the name."""
        return self._of.from_pretrained(self._folder, local_files_only=True)


def _local_model_class(folder: Path) -> Any:
    """The network, whose constructor names the hub, made to read `folder` instead."""
    import sys

    import transformers

    model_class = _model_class()
    module: Any = sys.modules[model_class.__module__]
    module.LlamaTokenizer = _Local(transformers.LlamaTokenizer, folder)
    module.CLIPImageProcessor = _Local(transformers.CLIPImageProcessor, folder)
    return model_class


def build_model(folder: Path, config: Mapping[str, Any]) -> Any:
    """The network with random weights.

    Args:
        folder: holds tokenizer and image processor.
        config: of MPLUGOwl2Config.

    Raises:
        WeightsMissing: the extra is not installed.
    """
    model_class = _local_model_class(folder)
    return model_class(model_class.config_class(**config))


def _single_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    # Two levels that begin with the same piece would share a logit, and the score would still look
    # right.
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"its tokenizer makes {len(ids)} pieces of the level {word!r}")
    return int(ids[0])


def _load_network(folder: Path, dtype: Any) -> Any:
    """The network with all of its weights.

    Raises:
        ValueError: parameters without weights, which transformers would leave random.
    """
    model, report = _local_model_class(folder).from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(f"{len(missing)} parameters have no weights, first {missing[0]}")
    return model.eval()


class QAlign:
    """The network and the five logits that matter."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load from a local folder; half precision on a GPU, float32 elsewhere.

        Raises:
            WeightsMissing: no pyiqa, no weights, or a folder that cannot be loaded.
        """
        import torch

        check_weights(folder)
        self._dtype = torch.float16 if device == "cuda" else torch.float32
        self._device = device
        try:
            self._model = _load_network(folder, self._dtype).to(device)
            self.level_ids = [_single_token(self._model.tokenizer, level) for level in LEVELS]
        except WeightsMissing:
            raise
        except Exception as problem:
            # Whatever a damaged folder makes the libraries raise.
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            raise WeightsMissing("usable Q-Align weights", folder, COMMAND, reason) from None
        self.prompt_ids = self._prompt_ids()

    def _prompt_ids(self) -> list[int]:
        """Start token, text, the place of the image, text.

        As in the released code, with which the weights were trained. Set here, because versions of
        transformers differ in whether a tokenizer adds the start token by itself.
        """
        import sys

        tokenizer = self._model.tokenizer
        image = sys.modules[type(self._model).__module__].IMAGE_TOKEN_INDEX
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPT)
        return [tokenizer.bos_token_id, *before, image, *after]

    def logits(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Logits of `LEVELS` at the last position of the prompt.

        Args:
            pixels: pictures, (H, W, 3) uint8 RGB of any size each.

        Returns:
            (pictures, 5) float64.
        """
        import torch

        images = torch.from_numpy(np.concatenate([preprocess(one) for one in pixels]))
        ids = torch.tensor([self.prompt_ids] * len(pixels), device=self._device)
        with torch.inference_mode():
            answer = self._model(
                input_ids=ids, images=images.to(self._device, self._dtype), return_dict=True
            )
        return answer["logits"][:, -1, self.level_ids].double().cpu().numpy()

    def __call__(self, pixels: np.ndarray) -> float:
        """Score of (H, W, 3) uint8 RGB, 1 to 5."""
        return score_from_logits(self.logits([pixels])[0])


# Once per worker.
_load = cache(QAlign)


def score_derivative(
    derivative: Derivative, *, folder: Path, digest: str, device: str
) -> dict[str, Any]:
    """Columns quality_score, quality_scorer and quality_weights of one derivative."""
    score = _load(folder, device)(decode_rgb(derivative.jpeg).pixels)
    return score_row("quality", score, SCORER, digest)


def open_scorer(job: ScoringJob, kind: Kind) -> DerivativeScorer:
    """Q-Align from the folder that `quality.qalign_weights` names.

    Raises:
        WeightsMissing: a file of it is not there.
    """
    named = job.settings.quality.qalign_weights
    folder = check_weights(None if named is None else job.root / named)
    device = job.settings.runtime.device
    # Hashed once, here: 16 GB of weights take a minute, and every row carries the digest.
    digest = folder_digest(folder)
    return DerivativeScorer(
        partial(score_derivative, folder=folder, digest=digest, device=device),
        score_schema(kind),
        model_limits(job.settings),
        key={"weights": digest, "device": device},
        modules=(expectation,),
        outside=(WeightsMissing,),
    )
